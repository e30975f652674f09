#include "model.h"

#include <dlfcn.h>
#include <elf.h>
#include <tvm/ffi/container/array.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "sha256.h"

namespace onnxcomp {
namespace {

namespace ffi = tvm::ffi;

constexpr int kPooled = 2;  // tvm::runtime::memory::AllocatorType

#if defined(__x86_64__)
constexpr Elf64_Half kMachine = EM_X86_64;
#elif defined(__aarch64__)
constexpr Elf64_Half kMachine = EM_AARCH64;
#else
#error "no other machine than x86-64 and aarch64 was tried"
#endif

void check_file(const Mapped& file, const FileFacts& facts, const char* name, bool hashed) {
  if (file.size() != facts.bytes) {
    throw BadInput(std::string(name) + " has " + std::to_string(file.size()) + " bytes and not the " +
                   std::to_string(facts.bytes) + " of the manifest");
  }
  if (hashed && sha256(file.data(), file.size()) != facts.sha256) {
    throw BadInput(std::string(name) + " is not the file that was compiled: its SHA-256 differs");
  }
}

// Tells in time what the loader would say in its own words.
void check_machine(const Mapped& file, const std::string& triple) {
  Elf64_Ehdr header;
  if (file.size() < sizeof header || std::memcmp(file.data(), ELFMAG, SELFMAG) != 0) {
    throw CannotLoad("model.so is no shared object");
  }
  std::memcpy(&header, file.data(), sizeof header);
  if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != kMachine) {
    throw CannotLoad("the artifact is for " + triple + " and not for this machine");
  }
}

ffi::Function function(const ffi::Module& module, const char* name) {
  const ffi::Optional<ffi::Function> found = module->GetFunction(name, true);
  if (!found.has_value()) throw CannotLoad("cannot load model.so: it holds no Relax executable with a main");
  return found.value();
}

std::string message(const ffi::Error& error) { return std::string(error.message()); }

}  // namespace

Model::Model(const std::string& folder, const Manifest& manifest, bool hashed)
    : manifest_(manifest), placement_(manifest.gpu), weights_(folder + "/weights.bin") {
  check_file(weights_, manifest.weights_file, "weights.bin", hashed);
  const std::string path = folder + "/model.so";
  {
    const Mapped file(path);
    check_file(file, manifest.model, "model.so", hashed);
    check_machine(file, manifest.triple);
  }
  // Sorting and random numbers: there for the models that need them.
  dlopen("libtvm_runtime_extra.so", RTLD_NOW | RTLD_GLOBAL);
  try {
    // A path without a slash would be looked for elsewhere.
    const ffi::Module library = ffi::Module::LoadFromFile(path[0] == '/' ? path : "./" + path);
    const auto machine = function(library, "vm_load_executable")().cast<ffi::Module>();
    const ffi::Function initialize = function(machine, "vm_initialization");
    if (placement_.gpu()) {
      initialize(static_cast<int>(placement_.device().device_type), 0, kPooled, static_cast<int>(kDLCPU), 0, kPooled);
    } else {
      initialize(static_cast<int>(kDLCPU), 0, kPooled);
    }
    main_ = function(machine, "main");
    machine_ = machine;
  } catch (const ffi::Error& error) {
    throw CannotLoad("cannot load model.so: " + message(error));
  }
  arguments_.resize(manifest.parameters.size());
  try {
    for (const State& state : manifest.state) {
      arguments_[parameter(state.input)] = placement_.zeros(state.shape, *state.type);
    }
    for (const Weight& weight : manifest.weights) {
      arguments_.push_back(
          placement_.placed(borrowed_tensor(weight.shape, *weight.type, weights_.data() + weight.offset)));
    }
  } catch (const ffi::Error& error) {
    throw CannotLoad("weights and state find no place: " + message(error));
  }
}

std::size_t Model::parameter(const std::string& name) const {
  const auto& all = manifest_.parameters;
  return static_cast<std::size_t>(std::find(all.begin(), all.end(), name) - all.begin());
}

ffi::Tensor Model::returned(const std::string& name) const {
  const auto& all = manifest_.returns;
  return results_[static_cast<std::size_t>(std::find(all.begin(), all.end(), name) - all.begin())];
}

void Model::bind(std::size_t input, ffi::Tensor tensor) {
  const std::size_t at = parameter(manifest_.inputs[input].name);
  arguments_[at] = placement_.placed(tensor);
  if (placement_.gpu()) given_.emplace_back(at, std::move(tensor));
}

void Model::call() {
  for (const auto& [at, tensor] : given_) placement_.copy(tensor, arguments_[at]);
  std::vector<ffi::AnyView> packed(arguments_.begin(), arguments_.end());
  ffi::Any result;
  results_.clear();
  try {
    main_.CallPacked(packed.data(), static_cast<int32_t>(packed.size()), &result);
  } catch (const ffi::Error& error) {
    throw BadInput("the model failed: " + message(error));
  }
  if (auto one = result.try_cast<ffi::Tensor>()) {
    results_.push_back(*one);
  } else if (auto several = result.try_cast<ffi::Array<ffi::Tensor>>()) {
    results_.assign(several->begin(), several->end());
  }
  if (results_.size() != manifest_.returns.size()) {
    throw BadInput("main returns " + std::to_string(results_.size()) + " tensors and not the " +
                   std::to_string(manifest_.returns.size()) + " of the manifest");
  }
  fetched_.clear();
  if (placement_.gpu()) {
    for (const std::string& name : manifest_.outputs) fetched_.push_back(placement_.fetched(returned(name)));
    placement_.wait();  // a model may have state alone
  }
}

void Model::advance() {
  std::vector<ffi::Tensor> next;
  for (const State& state : manifest_.state) {
    ffi::Tensor given = returned(state.output);
    const DLDataType type = given.dtype();
    if (element_type(type.code, type.bits) != state.type || type.lanes != 1 ||
        !std::equal(state.shape.begin(), state.shape.end(), given.shape().begin(), given.shape().end())) {
      throw BadInput("state '" + state.output + "' is not of the shape and type of the manifest");
    }
    // A model may hand on one of its inputs, which the next step overwrites, or one tensor twice.
    const auto same = [&](const ffi::Tensor& other) { return begin_of(other) == begin_of(given); };
    const ffi::Tensor& own = arguments_[parameter(state.input)];
    const bool shared =
        std::any_of(arguments_.begin(), arguments_.end(),
                    [&](const ffi::Tensor& other) { return same(other) && !other.same_as(own); }) ||
        std::any_of(next.begin(), next.end(), same);
    if (shared) {
      const ffi::Tensor copy = placement_.zeros(state.shape, *state.type);
      placement_.copy(given, copy);
      given = copy;
    }
    next.push_back(given);
  }
  for (std::size_t i = 0; i < next.size(); ++i) arguments_[parameter(manifest_.state[i].input)] = next[i];
}

ffi::Tensor Model::output(std::size_t index) const {
  return placement_.gpu() ? fetched_[index] : returned(manifest_.outputs[index]);
}

}  // namespace onnxcomp
