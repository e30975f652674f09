// Layers that recompute only what changed: which pixels of an output the changed pixels of its input reach.
//
// Maps are NHWC, with a byte for each pixel that says whether it changed: one that is not 0 does.

#pragma once

#include <algorithm>

#include "isa.h"

namespace onnxcomp::delta {

// A pixel of an output: `row` counts through the rows of all images.
struct Place {
  std::uint32_t row, x;
};

// One axis of a window that slides over a map. All numbers are below 2^31, so that no product of two overflows 64 bits.
struct Axis {
  std::int64_t in = 1, out = 1, kernel = 1, stride = 1, pad = 0, dilation = 1;

  // Where tap `k` of the window of output `o` reads; outside [0, in) lies the padding.
  std::int64_t at(std::int64_t o, std::int64_t k) const { return o * stride - pad + k * dilation; }
  bool inside(std::int64_t position) const { return position >= 0 && position < in; }
  // Whether every tap of output `o` lies on the map.
  bool whole(std::int64_t o) const { return at(o, 0) >= 0 && at(o, kernel - 1) < in; }
};

struct Window {
  std::size_t images = 1;
  Axis y, x;
};

// Whether a byte of `mask` is not 0.
inline bool any_set(const std::uint8_t* mask, std::size_t count) {
  std::size_t i = 0;
  for (; i + 64 <= count; i += 64) {
    std::uint64_t words[8], all = 0;
    std::memcpy(words, mask + i, sizeof(words));
    for (const std::uint64_t word : words) all |= word;
    if (all != 0) return true;
  }
  std::uint8_t all = 0;
  for (; i < count; ++i) all = static_cast<std::uint8_t>(all | mask[i]);
  return all != 0;
}

// Adds the marked pixels of a row.
inline Place* list_row(const std::uint8_t* marks, std::size_t width, std::uint32_t row, Place* end) {
  std::size_t x = 0;
  for (; x + 8 <= width; x += 8) {
    std::uint64_t word;
    std::memcpy(&word, marks + x, sizeof(word));
    if (word == 0) continue;
    if (word == 0x0101010101010101u) {
      for (std::size_t i = x; i < x + 8; ++i) *end++ = {row, static_cast<std::uint32_t>(i)};
      continue;
    }
    for (std::size_t i = x; i < x + 8; ++i) {
      *end = {row, static_cast<std::uint32_t>(i)};
      end += marks[i] != 0;
    }
  }
  for (; x < width; ++x) {
    *end = {row, static_cast<std::uint32_t>(x)};
    end += marks[x] != 0;
  }
  return end;
}

inline std::size_t list_all(std::size_t rows, std::size_t width, Place* places) {
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t x = 0; x < width; ++x) {
      *places++ = {static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(x)};
    }
  }
  return rows * width;
}

// Bytes of scratch memory that `list_reached` takes.
inline std::size_t reach_bytes(const Window& w) { return static_cast<std::size_t>(w.x.in + w.x.out); }

// Lists the pixels of the output, in order, whose window has a marked pixel in it. `places` has room for all of them
// and for one more, which may be written but does not count.
inline std::size_t list_reached(const std::uint8_t* mask, const Window& w, std::uint8_t* scratch, Place* places) {
  const std::size_t width = static_cast<std::size_t>(w.x.in), out_width = static_cast<std::size_t>(w.x.out);
  if (!any_set(mask, w.images * static_cast<std::size_t>(w.y.in) * width)) return 0;
  std::uint8_t *row = scratch, *marks = scratch + width;
  Place* end = places;
  for (std::size_t n = 0; n < w.images; ++n) {
    const std::uint8_t* image = mask + n * static_cast<std::size_t>(w.y.in) * width;
    for (std::int64_t oy = 0; oy < w.y.out; ++oy) {
      const std::uint8_t* seen = nullptr;  // the rows in the window, together
      for (std::int64_t k = 0; k < w.y.kernel; ++k) {
        const std::int64_t y = w.y.at(oy, k);
        if (!w.y.inside(y)) continue;
        const std::uint8_t* other = image + static_cast<std::size_t>(y) * width;
        if (!any_set(other, width)) continue;
        if (seen == nullptr) {
          seen = other;
          continue;
        }
        for (std::size_t x = 0; x < width; ++x) row[x] = static_cast<std::uint8_t>(seen[x] | other[x]);
        seen = row;
      }
      if (seen == nullptr) continue;
      const std::uint32_t out_row = static_cast<std::uint32_t>(n * static_cast<std::size_t>(w.y.out)) +
                                    static_cast<std::uint32_t>(oy);
      if (w.x.kernel == 1 && w.x.stride == 1 && w.x.pad == 0 && w.x.in == w.x.out) {
        end = list_row(seen, out_width, out_row, end);
        continue;
      }
      std::memset(marks, 0, out_width);
      for (std::int64_t k = 0; k < w.x.kernel; ++k) {
        const std::int64_t shift = w.x.at(0, k), stride = w.x.stride;
        const std::int64_t first = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
        const std::int64_t stop = shift >= w.x.in ? 0 : std::min(w.x.out, (w.x.in - 1 - shift) / stride + 1);
        if (stride == 1) {
          for (std::int64_t x = first; x < stop; ++x) marks[x] = static_cast<std::uint8_t>(marks[x] | seen[x + shift]);
        } else {
          for (std::int64_t x = first; x < stop; ++x) {
            marks[x] = static_cast<std::uint8_t>(marks[x] | seen[x * stride + shift]);
          }
        }
      }
      end = list_row(marks, out_width, out_row, end);
    }
  }
  return static_cast<std::size_t>(end - places);
}

// Copies the rows of taps of a window that is cut at its left or right, with zeros for what is outside, to
// `cut` [kernel_h, kernel_w * pitch], and points `to` [kernel_h] at them.
inline void cut_rows(const float* x, std::size_t pitch, const Window& w, std::int64_t image, std::int64_t oy,
                     std::int64_t ox, float* cut, const float** to) {
  const std::int64_t left = w.x.at(ox, 0);
  const std::int64_t begin = std::max<std::int64_t>(left, 0), end = std::min(left + w.x.kernel, w.x.in);
  const std::size_t length = static_cast<std::size_t>(w.x.kernel) * pitch;
  for (std::int64_t ky = 0; ky < w.y.kernel; ++ky, cut += length) {
    const std::int64_t y = w.y.at(oy, ky);
    to[ky] = cut;
    std::memset(cut, 0, length * sizeof(float));
    if (!w.y.inside(y) || begin >= end) continue;
    std::memcpy(cut + static_cast<std::size_t>(begin - left) * pitch,
                x + static_cast<std::size_t>((image * w.y.in + y) * w.x.in + begin) * pitch,
                static_cast<std::size_t>(end - begin) * pitch * sizeof(float));
  }
}

template <std::size_t kCount>
ONNXCOMP_INLINE void shift(const float* base, const std::ptrdiff_t* ONNXCOMP_RESTRICT distances,
                           const float** ONNXCOMP_RESTRICT to) {
  for (std::size_t t = 0; t < kCount; ++t) to[t] = base + distances[t];
}

// For each pixel of `places` the addresses of the input's pixels under its taps, [count][kernel_h * kernel_w];
// `distances` has room for those of one pixel. Pixels of the input are `pitch` floats apart. `zeros` stands in for what
// is outside. With `cut`, room for [count, kernel_h * kernel_w * pitch] floats, taps of a row are to follow each other,
// as they do without dilation, and there are only the addresses of rows, [count][kernel_h]; `zeros` is a row then.
inline void point_at_taps(const float* x, std::size_t pitch, const Window& w, const Place* places, std::size_t count,
                          const float* zeros, std::ptrdiff_t* distances, const float** to, float* cut = nullptr) {
  const bool rows_only = cut != nullptr;
  const std::int64_t columns = rows_only ? 1 : w.x.kernel;
  const std::size_t each = static_cast<std::size_t>(w.y.kernel * columns);
  const std::int64_t step = static_cast<std::int64_t>(pitch);
  // Elsewhere these numbers may overflow.
  const bool fits = (w.y.kernel - 1) * w.y.dilation < w.y.in && (w.x.kernel - 1) * w.x.dilation < w.x.in;
  for (std::int64_t ky = 0, t = 0; fits && ky < w.y.kernel; ++ky) {
    for (std::int64_t kx = 0; kx < columns; ++kx, ++t) {
      distances[t] = (ky * w.y.dilation * w.x.in + kx * w.x.dilation) * step;
    }
  }
  // Outputs of a row whose windows are not cut at a side.
  std::int64_t whole_begin = (w.x.pad + w.x.stride - 1) / w.x.stride, whole_end = whole_begin;
  if (fits) whole_end = (w.x.in - 1 - (w.x.kernel - 1) * w.x.dilation + w.x.pad) / w.x.stride + 1;
  std::uint32_t row = places[0].row + 1;
  std::int64_t oy = 0, image = 0, origin = 0;
  bool whole_row = false;
  for (std::size_t i = 0; i < count; ++i, to += each) {
    if (places[i].row != row) {
      row = places[i].row;
      oy = row % w.y.out, image = row / w.y.out;
      whole_row = fits && w.y.whole(oy);
      if (whole_row) origin = (image * w.y.in + w.y.at(oy, 0)) * w.x.in - w.x.pad;
    }
    const std::int64_t ox = places[i].x;
    if (whole_row && ox >= whole_begin && ox < whole_end) {
      const float* base = x + (origin + ox * w.x.stride) * step;
      switch (each) {
        case 1: to[0] = base; break;
        case 3: shift<3>(base, distances, to); break;
        case 9: shift<9>(base, distances, to); break;
        default:
          for (std::size_t t = 0; t < each; ++t) to[t] = base + distances[t];
      }
    } else if (rows_only && !w.x.whole(ox)) {
      cut_rows(x, pitch, w, image, oy, ox, cut, to);
      cut += static_cast<std::size_t>(w.y.kernel * w.x.kernel) * pitch;
    } else {
      for (std::int64_t ky = 0, t = 0; ky < w.y.kernel; ++ky) {
        const std::int64_t y = w.y.at(oy, ky);
        for (std::int64_t kx = 0; kx < columns; ++kx, ++t) {
          const std::int64_t at = w.x.at(ox, kx);
          const bool inside = w.y.inside(y) && w.x.inside(at);
          to[t] = inside ? x + ((image * w.y.in + y) * w.x.in + at) * step : zeros;
        }
      }
    }
  }
}

}  // namespace onnxcomp::delta
