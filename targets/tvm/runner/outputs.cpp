#include "outputs.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>

namespace onnxcomp {
namespace {

// A tensor's name as the name of a file: other characters than those that every file system takes become `_`.
std::string file_name(const std::string& name) {
  std::string out = name.substr(0, 200);
  for (char& c : out) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '-' && c != '_') c = '_';
  }
  if (out.empty() || out[0] == '.') out.insert(out.begin(), '_');
  return out + ".npy";
}

}  // namespace

Writer::Writer(const Manifest& manifest, const Options& options) : manifest_(manifest), options_(options) {
  if (options.out.empty()) return;
  if (mkdir(options.out.c_str(), 0777) != 0 && errno != EEXIST) {
    throw BadInput("cannot make the folder " + options.out + ": " + std::strerror(errno));
  }
  std::vector<std::string> temporary;
  for (const std::string& name : manifest.outputs) {
    std::string file = file_name(name);
    while (std::count(names_.begin(), names_.end(), file) > 0) file.insert(file.begin(), '_');
    names_.push_back(file);
    temporary.push_back(options.out + "/." + names_.back() + "." + std::to_string(getpid()));
  }
  remove_at_signal(temporary);
  for (std::size_t i = 0; i < names_.size(); ++i) files_.emplace_back(temporary[i], options.out + "/" + names_[i]);
  shapes_.resize(names_.size());
}

void Writer::add(const Model& model, std::int64_t step) {
  for (std::size_t i = 0; i < files_.size(); ++i) {
    const tvm::ffi::Tensor tensor = model.output(i);
    const Shape shape(tensor.shape().begin(), tensor.shape().end());
    const ElementType* const type = element_type(tensor.dtype().code, tensor.dtype().bits);
    const std::string named = "output '" + manifest_.outputs[i] + "'";
    if (type == nullptr || tensor.dtype().lanes != 1) throw BadInput(named + " is of a type that .npy has not");
    if (step == 0) {
      shapes_[i] = shape;
      Shape stacked = shape;
      if (options_.steps > 0) stacked.insert(stacked.begin(), options_.steps);
      const std::string header = npy_header(stacked, *type);
      files_[i].write(header.data(), header.size());
    } else if (shape != shapes_[i]) {
      throw BadInput(named + " changes its shape from step to step, so it cannot be stacked");
    }
    files_[i].write(begin_of(tensor), bytes_of(shape, *type));
  }
}

void Writer::commit() {
  for (Output& file : files_) file.commit();
}

}  // namespace onnxcomp
