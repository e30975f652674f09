// Element types, shapes, and the .npy format.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "files.h"

namespace onnxcomp {

using Shape = std::vector<std::int64_t>;

// An element type by its names here, in .npy files, and in DLPack.
struct ElementType {
  const char* name;
  const char* npy;
  std::uint8_t code;  // of DLDataTypeCode
  std::uint8_t bits;

  std::size_t bytes() const { return bits / 8; }
};

// Null if the runner does not know it.
const ElementType* element_type(const std::string& name);
const ElementType* element_type(std::uint8_t code, std::uint8_t bits);

// Bytes of a tensor. Throws BadInput if they do not fit in 63 bits or a dimension is negative.
std::size_t bytes_of(const Shape& shape, const ElementType& type);

std::string text(const Shape& shape);

// An array in a .npy file of version 1 to 3, little-endian and in C order.
struct Npy {
  explicit Npy(const std::string& path);

  Mapped file;
  Shape shape;
  const ElementType* type = nullptr;
  const std::uint8_t* data = nullptr;
};

// Header of a .npy file, padded so that the data begin at a multiple of 64 bytes.
std::string npy_header(const Shape& shape, const ElementType& type);

}  // namespace onnxcomp
