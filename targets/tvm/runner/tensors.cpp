#include "tensors.h"

#include <dlpack/dlpack.h>

#include <cctype>
#include <cstring>
#include <limits>

namespace onnxcomp {
namespace {

constexpr ElementType kTypes[] = {
    {"float32", "<f4", kDLFloat, 32}, {"float64", "<f8", kDLFloat, 64}, {"float16", "<f2", kDLFloat, 16},
    {"int8", "|i1", kDLInt, 8},       {"int16", "<i2", kDLInt, 16},     {"int32", "<i4", kDLInt, 32},
    {"int64", "<i8", kDLInt, 64},     {"uint8", "|u1", kDLUInt, 8},     {"uint16", "<u2", kDLUInt, 16},
    {"uint32", "<u4", kDLUInt, 32},   {"uint64", "<u8", kDLUInt, 64},   {"bool", "|b1", kDLBool, 8},
};
constexpr std::size_t kMaxHeader = std::size_t{1} << 16;
constexpr std::size_t kMaxRank = 32;

// Reads the dictionary in a header, a Python literal of which NumPy writes one form only.
class Header {
 public:
  Header(const std::string& text, const std::string& path) : text_(text), path_(path) {}

  void read(Npy& into) {
    expect('{');
    while (!take('}')) {
      const std::string key = quoted();
      expect(':');
      if (key == "descr") {
        set_type(quoted(), into);
      } else if (key == "fortran_order") {
        fortran_ = word() == "True";
      } else if (key == "shape") {
        set_shape(into);
      } else {
        fail("its header is malformed");
      }
      if (!take(',') && peek() != '}') fail("its header is malformed");
    }
    if (into.type == nullptr || !has_shape_) fail("its header is malformed");
    if (fortran_ && into.shape.size() > 1) fail("it is in Fortran order; save it by numpy.ascontiguousarray");
  }

  [[noreturn]] void fail(const std::string& problem) const { throw BadInput(path_ + ": " + problem); }

 private:
  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c || c == '\0') return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail("its header is malformed");
  }
  std::string quoted() {
    expect('\'');
    const std::size_t end = text_.find('\'', at_);
    if (end == std::string::npos) fail("its header is malformed");
    const std::string out = text_.substr(at_, end - at_);
    for (const char c : out) {
      if (c < ' ' || c > '~') fail("its header is malformed");
    }
    at_ = end + 1;
    return out;
  }
  std::string word() {
    peek();
    const std::size_t begin = at_;
    while (at_ < text_.size() && std::isalnum(static_cast<unsigned char>(text_[at_]))) ++at_;
    return text_.substr(begin, at_ - begin);
  }
  void set_type(const std::string& code, Npy& into) {
    for (const ElementType& type : kTypes) {
      if (code == type.npy) into.type = &type;
    }
    if (into.type == nullptr) fail("its element type '" + code + "' is none of little-endian numbers and bool");
  }
  void set_shape(Npy& into) {
    has_shape_ = true;
    expect('(');
    while (!take(')')) {
      const std::string digits = word();
      if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos ||
          into.shape.size() == kMaxRank) {
        fail("its header is malformed");
      }
      into.shape.push_back(std::stoll(digits));
      if (!take(',') && peek() != ')') fail("its header is malformed");
    }
  }

  const std::string& text_;
  const std::string& path_;
  std::size_t at_ = 0;
  bool fortran_ = false, has_shape_ = false;
};

}  // namespace

const ElementType* element_type(const std::string& name) {
  for (const ElementType& type : kTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

const ElementType* element_type(std::uint8_t code, std::uint8_t bits) {
  for (const ElementType& type : kTypes) {
    if (code == type.code && bits == type.bits) return &type;
  }
  return nullptr;
}

std::size_t bytes_of(const Shape& shape, const ElementType& type) {
  std::uint64_t total = type.bytes();
  bool empty = false;
  for (const std::int64_t size : shape) {
    if (size < 0) throw BadInput("a dimension is negative in shape " + text(shape));
    if (size == 0) {
      empty = true;
    } else if (total > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max() / size)) {
      throw BadInput("a tensor is too large: shape " + text(shape));
    } else {
      total *= static_cast<std::uint64_t>(size);
    }
  }
  return empty ? 0 : static_cast<std::size_t>(total);
}

std::string text(const Shape& shape) {
  std::string out = "[";
  for (const std::int64_t size : shape) out += (out.size() > 1 ? "," : "") + std::to_string(size);
  return out + "]";
}

Npy::Npy(const std::string& path) : file(path) {
  const std::uint8_t* const bytes = file.data();
  const std::size_t size = file.size();
  if (size < 12 || std::memcmp(bytes, "\x93NUMPY", 6) != 0 || bytes[6] < 1 || bytes[6] > 3) {
    throw BadInput(path + ": it is no .npy file of version 1 to 3");
  }
  const std::size_t begin = bytes[6] == 1 ? 10 : 12;
  std::size_t length = bytes[8] | static_cast<std::size_t>(bytes[9]) << 8;
  if (begin == 12) length |= static_cast<std::size_t>(bytes[10]) << 16 | static_cast<std::size_t>(bytes[11]) << 24;
  if (length > kMaxHeader || length > size - begin) throw BadInput(path + ": its header is malformed");
  const std::string dictionary(reinterpret_cast<const char*>(bytes) + begin, length);
  Header header(dictionary, path);
  header.read(*this);
  if (bytes_of(shape, *type) != size - begin - length) header.fail("it is not of the size that its header states");
  data = bytes + begin + length;
}

std::string npy_header(const Shape& shape, const ElementType& type) {
  std::string dictionary = std::string("{'descr': '") + type.npy + "', 'fortran_order': False, 'shape': (";
  for (const std::int64_t size : shape) dictionary += std::to_string(size) + ",";
  dictionary += "), }";
  constexpr std::size_t kPrefix = 10;
  dictionary.append(63 - (kPrefix + dictionary.size()) % 64, ' ');
  dictionary += '\n';
  std::string out("\x93NUMPY\x01\x00", 8);
  out += static_cast<char>(dictionary.size() & 0xff);
  out += static_cast<char>(dictionary.size() >> 8);
  return out + dictionary;
}

}  // namespace onnxcomp
