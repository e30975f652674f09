#include "feeds.h"

#include <cstring>
#include <map>

#include "placement.h"

namespace onnxcomp {
namespace {

// xorshift64*, so that the pattern is the same on every machine.
class Pattern {
 public:
  explicit Pattern(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  std::uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1Du;
  }

 private:
  std::uint64_t state_;
};

template <typename T>
void put(std::uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// Floats between -1 and 1; whole numbers are 0 or 1, which are valid wherever an index is expected.
void fill_randomly(std::uint8_t* to, std::size_t bytes, const ElementType& type, std::uint64_t seed) {
  Pattern pattern(seed);
  for (std::size_t at = 0; at < bytes; at += type.bytes()) {
    const std::uint64_t bits = pattern.next() >> 40;  // 24 of them
    if (type.code != kDLFloat) {
      std::memset(to + at, 0, type.bytes());
      to[at] = bits & 1;
    } else if (type.bits == 16) {  // of a magnitude from 0.5 to 1
      put(to + at, static_cast<std::uint16_t>((bits & 1) << 15 | 0x3800 | (bits >> 1 & 0x3ff)));
    } else {
      const float value = static_cast<float>(bits) / 8388608.0f - 1.0f;
      if (type.bits == 32) put(to + at, value);
      if (type.bits == 64) put(to + at, static_cast<double>(value));
    }
  }
}

std::string described(const std::vector<Dimension>& shape) {
  std::string out = "[";
  for (const Dimension& one : shape) {
    out += (out.size() > 1 ? "," : "") + (one.symbol.empty() ? std::to_string(one.size) : one.symbol);
  }
  return out + "]";
}

// Gives the shape of one step, and the sizes that symbols have in it.
Shape checked(const Port& port, const Npy& array, const Options& options,
              std::map<std::string, std::int64_t>& symbols) {
  if (array.type != port.type) {
    throw BadInput("input '" + port.name + "' is " + array.type->name + " and not " + port.type->name);
  }
  Shape shape = array.shape;
  if (options.steps > 0) {
    if (shape.empty() || shape[0] != options.steps) {
      throw BadInput("input '" + port.name + "' has the shape " + text(shape) + ", whose first axis is not the " +
                     std::to_string(options.steps) + " of --steps");
    }
    shape.erase(shape.begin());
  }
  if (port.any_shape) return shape;
  bool fits = shape.size() == port.shape.size();
  for (std::size_t i = 0; fits && i < shape.size(); ++i) {
    const Dimension& wanted = port.shape[i];
    if (wanted.symbol == kAny) continue;
    fits = shape[i] == (wanted.symbol.empty() ? wanted.size : symbols.emplace(wanted.symbol, shape[i]).first->second);
  }
  if (!fits) {
    throw BadInput("input '" + port.name + "' has the shape " + text(shape) + " and not " + described(port.shape));
  }
  return shape;
}

}  // namespace

Feeds::Feeds(const Manifest& manifest, const Options& options) : arrays_(manifest.inputs.size()) {
  std::vector<Shape> shapes(manifest.inputs.size());
  std::map<std::string, std::int64_t> symbols;
  for (const std::string& word : options.inputs) {
    std::size_t index = 0;  // not split at '=', which names may hold
    while (index < arrays_.size() && word.rfind(manifest.inputs[index].name + "=", 0) != 0) ++index;
    if (index == arrays_.size()) throw BadInput("--input " + word + ": there is no such input");
    const Port& port = manifest.inputs[index];
    if (arrays_[index]) throw BadInput("input '" + port.name + "' is given twice");
    arrays_[index].emplace(word.substr(port.name.size() + 1));
    shapes[index] = checked(port, *arrays_[index], options, symbols);
  }
  for (std::size_t i = 0; i < arrays_.size(); ++i) {
    const Port& port = manifest.inputs[i];
    if (!arrays_[i]) {
      if (!options.random) throw BadInput("input '" + port.name + "' is missing; see --input and --random");
      if (port.any_shape) throw BadInput("input '" + port.name + "' has no shape to fill; see --input");
      for (const Dimension& one : port.shape) {
        shapes[i].push_back(one.symbol.empty() ? one.size : symbols.emplace(one.symbol, 1).first->second);
      }
    }
    types_.push_back(port.type);
    tensors_.push_back(new_tensor(shapes[i], *port.type));
  }
}

void Feeds::fill(std::int64_t step) {
  for (std::size_t i = 0; i < arrays_.size(); ++i) {
    const Shape shape(tensors_[i].shape().begin(), tensors_[i].shape().end());
    const std::size_t bytes = bytes_of(shape, *types_[i]);
    auto* const to = static_cast<std::uint8_t*>(begin_of(tensors_[i]));
    if (arrays_[i]) {
      if (bytes > 0) std::memcpy(to, arrays_[i]->data + static_cast<std::size_t>(step) * bytes, bytes);
    } else {
      fill_randomly(to, bytes, *types_[i], i << 32 | static_cast<std::uint64_t>(step));
    }
  }
}

}  // namespace onnxcomp
