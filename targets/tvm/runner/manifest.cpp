#include "manifest.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/json.h>

#include <algorithm>

namespace onnxcomp {
namespace {

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

constexpr std::size_t kMaxBytes = std::size_t{1} << 26;
constexpr int kMaxDepth = 32;
constexpr std::size_t kAlignment = 64;  // that kernels may count on for weights

[[noreturn]] void malformed(const std::string& where) { throw BadInput("manifest.json is malformed: " + where); }

// The parser recurses, so depth is bounded before it runs.
void check_depth(const Mapped& file) {
  int depth = 0;
  bool quoted = false;
  for (std::size_t i = 0; i < file.size(); ++i) {
    const char c = static_cast<char>(file.data()[i]);
    if (quoted) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        quoted = false;
      }
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) malformed("it is nested too deeply");
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
}

json::Value value(const json::Object& object, const char* key) {
  const ffi::Any name = ffi::String(key);
  if (object.count(name) == 0) malformed(std::string("there is no '") + key + "'");
  return object[name];
}

json::Object object(const json::Value& any, const char* where) {
  if (auto out = any.try_cast<json::Object>()) return *out;
  malformed(std::string("'") + where + "' has to be an object");
}

json::Array list(const json::Object& from, const char* key) {
  if (auto out = value(from, key).try_cast<json::Array>()) return *out;
  malformed(std::string("'") + key + "' has to be a list");
}

std::string string(const json::Value& any, const char* where) {
  if (auto out = any.try_cast<ffi::String>()) {
    std::string copy(out->data(), out->size());
    if (copy.find('\0') == std::string::npos) return copy;
  }
  malformed(std::string("'") + where + "' has to be a string");
}

std::string string(const json::Object& from, const char* key) { return string(value(from, key), key); }

std::int64_t whole(const json::Value& any, const char* where) {
  // Not a conversion: true and 1.0 are no sizes.
  if (any.type_index() == ffi::TypeIndex::kTVMFFIInt) {
    const std::int64_t out = any.cast<std::int64_t>();
    if (out >= 0) return out;
  }
  malformed(std::string("'") + where + "' has to be a whole number");
}

std::int64_t whole(const json::Object& from, const char* key) { return whole(value(from, key), key); }

std::vector<std::string> names(const json::Object& from, const char* key) {
  std::vector<std::string> out;
  for (const json::Value& any : list(from, key)) {
    out.push_back(string(any, key));
    if (std::count(out.begin(), out.end(), out.back()) > 1) malformed("'" + out.back() + "' is listed twice");
  }
  return out;
}

const ElementType* type(const json::Object& from) {
  const std::string name = string(from, "dtype");
  if (const ElementType* out = element_type(name)) return out;
  malformed("the runner does not know element type '" + name + "'");
}

Shape fixed_shape(const json::Object& from) {
  Shape out;
  for (const json::Value& any : list(from, "shape")) out.push_back(whole(any, "shape"));
  return out;
}

Port port(const json::Object& from) {
  Port out{string(from, "name"), type(from), {}, value(from, "shape") == nullptr};
  if (out.any_shape) return out;
  for (const json::Value& any : list(from, "shape")) {
    if (any.type_index() == ffi::TypeIndex::kTVMFFIInt) {
      out.shape.push_back({whole(any, "shape"), ""});
    } else {
      const std::string symbol = any == nullptr ? kAny : string(any, "shape");
      out.shape.push_back({0, symbol.empty() ? kAny : symbol});
    }
  }
  return out;
}

FileFacts facts(const json::Object& files, const char* name) {
  const json::Object entry = object(value(files, name), name);
  return {static_cast<std::uint64_t>(whole(entry, "bytes")), string(entry, "sha256")};
}

Weight weight(const json::Object& from, std::uint64_t file_bytes) {
  Weight out{type(from), fixed_shape(from), static_cast<std::size_t>(whole(from, "offset"))};
  const std::size_t bytes = bytes_of(out.shape, *out.type);
  if (static_cast<std::uint64_t>(whole(from, "bytes")) != bytes || out.offset % kAlignment != 0 ||
      out.offset > file_bytes || bytes > file_bytes - out.offset) {
    malformed("weight '" + string(from, "name") + "' does not lie in weights.bin");
  }
  return out;
}

bool contains(const std::vector<std::string>& all, const std::string& name) {
  return std::find(all.begin(), all.end(), name) != all.end();
}

// Every parameter is an input or a state, and every output and new state is returned.
void check_names(const Manifest& m) {
  std::vector<std::string> taken;
  for (const Port& one : m.inputs) taken.push_back(one.name);
  for (const State& one : m.state) taken.push_back(one.input);
  std::vector<std::string> sorted = m.parameters;
  std::sort(taken.begin(), taken.end());
  std::sort(sorted.begin(), sorted.end());
  if (taken != sorted) malformed("'parameters' are not the inputs and states");
  for (const std::string& one : m.outputs) {
    if (!contains(m.returns, one)) malformed("output '" + one + "' is not returned");
  }
  for (const State& one : m.state) {
    if (!contains(m.returns, one.output)) malformed("state '" + one.output + "' is not returned");
  }
}

Manifest checked(const json::Object& root) {
  if (whole(root, "manifest_version") != 1) {
    throw BadInput("manifest.json is of a version that this runner does not know");
  }
  if (string(root, "target").rfind("tvm-", 0) != 0) throw BadInput("the artifact is for another target than TVM's");
  Manifest out;
  out.triple = string(root, "triple");
  out.gpu = string(root, "gpu");
  const json::Object files = object(value(root, "files"), "files");
  out.model = facts(files, "model.so");
  out.weights_file = facts(files, "weights.bin");
  out.parameters = names(root, "parameters");
  out.returns = names(root, "returns");
  for (const json::Value& any : list(root, "inputs")) out.inputs.push_back(port(object(any, "inputs")));
  for (const json::Value& any : list(root, "outputs")) {
    out.outputs.push_back(string(object(any, "outputs"), "name"));
  }
  for (const json::Value& any : list(root, "state")) {
    const json::Object one = object(any, "state");
    out.state.push_back({string(one, "input"), string(one, "output"), type(one), fixed_shape(one)});
    bytes_of(out.state.back().shape, *out.state.back().type);
  }
  for (const json::Value& any : list(root, "weights")) {
    out.weights.push_back(weight(object(any, "weights"), out.weights_file.bytes));
  }
  check_names(out);
  return out;
}

}  // namespace

Manifest read_manifest(const std::string& path) {
  const Mapped file(path);
  if (file.size() > kMaxBytes) malformed("it is too large");
  check_depth(file);
  ffi::String problem;
  const json::Value parsed =
      json::Parse(ffi::String(reinterpret_cast<const char*>(file.data()), file.size()), &problem);
  if (!problem.empty()) malformed(std::string(problem.data(), problem.size()));
  return checked(object(parsed, "manifest.json"));
}

}  // namespace onnxcomp
