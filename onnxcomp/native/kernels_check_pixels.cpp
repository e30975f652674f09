// What kernels_check.cpp is for the other kernels, for those of layers that recompute changed pixels: every instruction
// set, random sizes and windows, buffers without a byte to spare, plain loops to hold the results against.

#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "kernels/delta_enter.h"
#include "kernels/delta_pool.h"
#include "kernels/depthwise.h"
#include "kernels/igemm.h"

namespace {

using namespace onnxcomp;

std::mt19937 g_random(1);
int g_failures = 0;

std::size_t below(std::size_t limit) { return g_random() % limit; }
std::int64_t from(std::int64_t least, std::size_t count) { return least + static_cast<std::int64_t>(below(count)); }
// Small integers: sums and comparisons are exact.
float integer() { return static_cast<float>(static_cast<int>(below(9)) - 4); }
float normal() { return std::normal_distribution<float>()(g_random); }

// Exactly as large as asked for, so that a sanitizer sees the first byte beyond.
template <typename One>
std::vector<float> make(std::size_t count, const One& one) {
  std::vector<float> made(count);
  for (float& value : made) value = one();
  made.shrink_to_fit();
  return made;
}

void fail(const char* name, Isa isa) {
  std::printf("%s, isa %d\n", name, static_cast<int>(isa));
  ++g_failures;
}

delta::Axis axis() {
  delta::Axis made;
  made.in = from(1, 14), made.kernel = from(1, 5), made.stride = from(1, 3), made.dilation = from(1, 3);
  made.pad = from(0, 5);
  // As many as begin on the map, or fewer.
  made.out = from(1, static_cast<std::size_t>((made.in - 1 + made.pad) / made.stride + 1));
  return made;
}

struct Layer {
  delta::Window window{1 + below(2), axis(), axis()};
  std::size_t rows, width, pixels, taps, in_pixels;

  Layer() { measure(); }
  void measure() {
    rows = window.images * static_cast<std::size_t>(window.y.out);
    width = static_cast<std::size_t>(window.x.out), pixels = rows * width;
    taps = static_cast<std::size_t>(window.y.kernel * window.x.kernel);
    in_pixels = window.images * static_cast<std::size_t>(window.y.in * window.x.in);
  }

  // The input's pixel under a tap, or -1.
  std::int64_t under(const delta::Place& place, std::size_t tap) const {
    const std::int64_t t = static_cast<std::int64_t>(tap), oy = place.row % window.y.out;
    const std::int64_t y = window.y.at(oy, t / window.x.kernel), x = window.x.at(place.x, t % window.x.kernel);
    if (!window.y.inside(y) || !window.x.inside(x)) return -1;
    return (place.row / window.y.out * window.y.in + y) * window.x.in + x;
  }
};

// Some of the pixels, in order.
std::vector<delta::Place> some_places(const Layer& layer) {
  std::vector<delta::Place> places(layer.pixels);
  delta::list_all(layer.rows, layer.width, places.data());
  const std::size_t keep = 1 + below(4);
  std::vector<delta::Place> kept;
  for (const delta::Place& place : places) {
    if (below(4) < keep) kept.push_back(place);
  }
  if (kept.empty()) kept.push_back(places[below(places.size())]);
  kept.shrink_to_fit();
  return kept;
}

void check_reached(Isa isa) {
  const Layer layer;
  std::vector<std::uint8_t> mask(layer.in_pixels), scratch(delta::reach_bytes(layer.window));
  const std::size_t density = 1 + below(20);
  for (std::uint8_t& m : mask) m = below(density) == 0;
  std::vector<delta::Place> places(layer.pixels + 1), all(layer.pixels);
  const std::size_t found = delta::list_reached(mask.data(), layer.window, scratch.data(), places.data());
  delta::list_all(layer.rows, layer.width, all.data());
  std::size_t i = 0;
  for (const delta::Place& place : all) {
    bool reached = false;
    for (std::size_t t = 0; t < layer.taps; ++t) {
      const std::int64_t at = layer.under(place, t);
      reached |= at >= 0 && mask[static_cast<std::size_t>(at)] != 0;
    }
    if (!reached) continue;
    if (i >= found || places[i].row != place.row || places[i].x != place.x) return fail("pixels reached", isa);
    ++i;
  }
  if (i != found) fail("number of pixels reached", isa);
}

void check_igemm(Isa isa, std::size_t round) {
  Layer layer;
  const bool rows_only = round % 3 == 0;
  if (rows_only) layer.window.x.dilation = 1;
  const std::size_t groups = rows_only ? 1 : 1 + below(3), depth = 1 + below(20), columns = 1 + below(120);
  const std::size_t inputs = groups * depth, outputs = groups * columns;
  const std::vector<float> x = make(layer.in_pixels * inputs, integer), b = make(outputs, integer);
  const std::vector<float> w = make(layer.taps * depth * outputs, integer);
  const std::vector<delta::Place> places = some_places(layer);
  const std::size_t count = places.size(), k = layer.taps * depth;
  const std::size_t runs = rows_only ? static_cast<std::size_t>(layer.window.y.kernel) : layer.taps;

  const igemm::Form form = igemm::choose(isa);
  const igemm::Weight shape{k, groups, columns};
  std::vector<float> packed(shape.floats(form)), bias(groups * shape.padded(form));
  igemm::pack(shape, form, w.data(), packed.data());
  igemm::pack_bias(shape, form, b.data(), bias.data());
  std::vector<float> zeros(rows_only ? k / runs : inputs), cut(rows_only ? count * k : 0);
  std::vector<const float*> taps(count * runs);
  std::vector<std::ptrdiff_t> distances(runs);
  delta::point_at_taps(x.data(), inputs, layer.window, places.data(), count, zeros.data(), distances.data(),
                       taps.data(), rows_only ? cut.data() : nullptr);
  const std::size_t pitch = groups == 1 ? shape.padded(form) : outputs;
  std::vector<float> y(count * pitch, NAN);
  const std::size_t panels = groups * igemm::Panels(shape.vectors(form)).count(), middle = below(panels + 1);
  const igemm::Inputs in{taps.data(), count, runs, k / runs};
  igemm::multiply(shape, form, packed.data(), bias.data(), in, y.data(), pitch, middle, panels);
  igemm::multiply(shape, form, packed.data(), bias.data(), in, y.data(), pitch, 0, middle);
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t j = 0; j < outputs; ++j) {
      float sum = b[j];
      for (std::size_t t = 0; t < layer.taps; ++t) {
        const std::int64_t at = layer.under(places[i], t);
        for (std::size_t c = 0; at >= 0 && c < depth; ++c) {
          sum += x[static_cast<std::size_t>(at) * inputs + j / columns * depth + c] * w[(t * depth + c) * outputs + j];
        }
      }
      if (y[i * pitch + j] != sum) return fail("convolution", isa);
    }
  }

  // Bits do not depend on the tile: floats whose sums are rounded.
  const std::vector<float> exact = make(x.size(), normal), wn = make(w.size(), normal);
  igemm::pack(shape, form, wn.data(), packed.data());
  delta::point_at_taps(exact.data(), inputs, layer.window, places.data(), count, zeros.data(), distances.data(),
                       taps.data(), rows_only ? cut.data() : nullptr);
  igemm::multiply(shape, form, packed.data(), bias.data(), in, y.data(), pitch, 0, panels);
  std::vector<float> alone(pitch);
  for (std::size_t i = 0; i < count; ++i) {
    igemm::multiply(shape, form, packed.data(), bias.data(), {taps.data() + i * runs, 1, runs, k / runs}, alone.data(),
                    pitch, 0, panels);
    if (std::memcmp(alone.data(), y.data() + i * pitch, outputs * sizeof(float)) != 0) {
      return fail("convolution of a pixel alone", isa);
    }
  }
}

void check_depthwise(Isa isa, std::size_t round) {
  Layer layer;
  if (round % 2 == 0) {  // windows that overlap
    layer.window.x = {from(5, 30), 0, from(1, 6), 1, from(0, 3), 1};
    layer.window.x.out = layer.window.x.in;
    layer.measure();
  }
  const bool neighbours = layer.window.x.stride == 1 && layer.window.x.dilation == 1;
  const std::size_t multiplier = round % 4 == 0 ? 1 + below(4) : 1, inputs = 1 + below(150), all = inputs * multiplier;
  const std::vector<float> x = make(layer.in_pixels * inputs, integer), b = make(all, integer);
  const std::vector<float> w = make(layer.taps * all, integer), zeros(inputs);
  const std::vector<delta::Place> places = some_places(layer);
  const std::size_t count = places.size();
  std::vector<const float*> taps(count * layer.taps);
  std::vector<std::ptrdiff_t> distances(layer.taps);
  delta::point_at_taps(x.data(), inputs, layer.window, places.data(), count, zeros.data(), distances.data(),
                       taps.data());
  std::vector<float> y(count * all, NAN);
  depthwise::choose(isa)({taps.data(), count, layer.taps, w.data(), b.data(), all, multiplier, y.data(),
                          neighbours ? static_cast<std::size_t>(layer.window.x.kernel) : 0});
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t j = 0; j < all; ++j) {
      float sum = b[j];
      for (std::size_t t = 0; t < layer.taps; ++t) {
        const std::int64_t at = layer.under(places[i], t);
        if (at >= 0) sum += x[static_cast<std::size_t>(at) * inputs + j / multiplier] * w[t * all + j];
      }
      if (y[i * all + j] != sum) return fail("depthwise convolution", isa);
    }
  }

  // Floats whose sums are rounded.
  const std::vector<float> exact = make(x.size(), normal), wn = make(w.size(), normal);
  delta::point_at_taps(exact.data(), inputs, layer.window, places.data(), count, zeros.data(), distances.data(),
                       taps.data());
  const std::size_t row = neighbours ? static_cast<std::size_t>(layer.window.x.kernel) : 0;
  depthwise::choose(isa)({taps.data(), count, layer.taps, wn.data(), b.data(), all, multiplier, y.data(), row});
  std::vector<float> alone(all);
  for (std::size_t i = 0; i < count; ++i) {
    depthwise::choose(isa)(
        {taps.data() + i * layer.taps, 1, layer.taps, wn.data(), b.data(), all, multiplier, alone.data(), row});
    if (std::memcmp(alone.data(), y.data() + i * all, all * sizeof(float)) != 0) {
      return fail("depthwise convolution of a pixel alone", isa);
    }
  }
}

void check_pool(Isa isa, std::size_t round) {
  const Layer layer;
  const std::size_t channels = 1 + below(150);
  const delta::Pool kind = round % 2 == 0 ? delta::Pool::kMax : delta::Pool::kAverage;
  const std::size_t divisor = round % 3 == 0 ? layer.taps : 0;
  const std::vector<float> x = make(layer.in_pixels * channels, integer);
  const std::vector<delta::Place> places = some_places(layer);
  const std::size_t count = places.size();
  std::vector<const float*> taps(count * layer.taps);
  std::vector<std::ptrdiff_t> distances(layer.taps);
  delta::point_at_taps(x.data(), channels, layer.window, places.data(), count, nullptr, distances.data(), taps.data());
  std::vector<float> y(count * channels, NAN);
  delta::choose_pools(isa).window({kind, taps.data(), count, layer.taps, channels, divisor, y.data()});
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t c = 0; c < channels; ++c) {
      float most = -std::numeric_limits<float>::infinity(), sum = 0, present = 0;
      for (std::size_t t = 0; t < layer.taps; ++t) {
        const std::int64_t at = layer.under(places[i], t);
        if (at < 0) continue;
        const float value = x[static_cast<std::size_t>(at) * channels + c];
        most = std::max(most, value), sum += value, ++present;
      }
      const float mean = sum / (divisor != 0 ? static_cast<float>(divisor) : std::max(present, 1.0f));
      if (y[i * channels + c] != (kind == delta::Pool::kMax ? most : mean)) return fail("pool", isa);
    }
  }
  const std::size_t pixels = layer.in_pixels;
  std::vector<float> whole(channels, NAN);
  delta::choose_pools(isa).global({kind, x.data(), pixels, channels, whole.data()});
  for (std::size_t c = 0; c < channels; ++c) {
    float most = x[c], sum = 0;
    for (std::size_t p = 0; p < pixels; ++p) most = std::max(most, x[p * channels + c]), sum += x[p * channels + c];
    const float expected = kind == delta::Pool::kMax ? most : sum / static_cast<float>(pixels);
    if (whole[c] != expected) return fail("global pool", isa);
  }
}

// Values, some of them not finite, with what is held, and what is to come of them.
struct Sent {
  std::size_t channels, pixels;
  bool started, rounds;
  float limit;
  std::vector<float> step, values, held, expected;
  std::vector<std::uint8_t> mask, marked;

  Sent(std::size_t c, std::size_t n, std::size_t round)
      : channels(c), pixels(n), started(round % 5 != 0), rounds(round % 2 == 0),
        limit(delta::square_limit(integer(), c)),
        step(make(c, [this] { return rounds ? integer() : 0.0f; })), values(make(n * c, integer)),
        held(values), mask(n), marked(n) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (below(8 * c) == 0) values[i] = integer();
      if (below(16 * c) == 0) values[i] = below(2) == 0 ? NAN : INFINITY;
    }
    expected = held;
    for (std::size_t i = 0; i < n; ++i) {
      float squares = 0;
      std::vector<float> y(c);
      for (std::size_t j = 0; j < c; ++j) {
        y[j] = values[i * c + j];
        if (step[j] > 0) y[j] = std::nearbyint(y[j] / step[j]) * step[j];
        squares += (y[j] - held[i * c + j]) * (y[j] - held[i * c + j]);
      }
      const bool sent = !started || !(squares <= limit);
      if (sent) std::copy(y.begin(), y.end(), expected.begin() + static_cast<std::ptrdiff_t>(i * c));
      marked[i] = sent;
    }
  }
  bool right() const {
    for (std::size_t i = 0; i < held.size(); ++i) {
      if (held[i] != expected[i] && !(std::isnan(held[i]) && std::isnan(expected[i]))) return false;
    }
    return mask == marked;
  }
};

void check_send(Isa isa, std::size_t round) {
  const std::size_t width = 1 + below(9), rows = 1 + below(9), channels = 1 + below(150), pitch = channels + below(3);
  Sent s(channels, width * rows, round);
  std::vector<float> values((s.pixels - 1) * pitch + channels);
  for (std::size_t i = 0; i < s.pixels; ++i) {
    std::copy_n(s.values.begin() + static_cast<std::ptrdiff_t>(i * channels), channels,
                values.begin() + static_cast<std::ptrdiff_t>(i * pitch));
  }
  std::vector<delta::Place> places(s.pixels);
  delta::list_all(rows, width, places.data());
  const delta::Stage stage{s.held.data(), s.mask.data(), s.limit, s.step.data(), channels, s.started, s.rounds};
  delta::choose_send(isa)(stage, places.data(), s.pixels, width, values.data(), pitch);
  if (!s.right()) fail("send", isa);
}

void check_enter(Isa isa, std::size_t round) {
  const std::size_t channels = round % 4 == 0 ? 1 + below(600) : 1 + below(20);
  const std::size_t block = delta::frame_block(channels), plane = 1 + below(2 * block);
  Sent s(channels, plane, round);
  std::vector<float> frame(channels * plane), step(delta::frame_steps(channels));
  for (std::size_t i = 0; i < frame.size(); ++i) frame[i] = s.values[i % plane * channels + i / plane];
  for (std::size_t i = 0; i < step.size(); ++i) step[i] = s.step[i % channels];
  const delta::Stage stage{nullptr, nullptr, s.limit, step.data(), channels, s.started, s.rounds};
  for (std::size_t first = 0; first < plane; first += block) {
    const std::size_t count = std::min(block, plane - first);
    std::vector<float> values(count * channels), squares(count * channels);
    delta::choose_enter(isa)({frame.data() + first, plane, &stage, s.held.data() + first * channels,
                              s.mask.data() + first, count, values.data(), squares.data()});
  }
  if (!s.right()) fail("enter", isa);
}

}  // namespace

int main() {
  const Isa best = choose_isa();
  std::vector<Isa> all = {Isa::kPortable};
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kVnni}) {
    if (best != Isa::kDotprod && isa <= best) all.push_back(isa);
  }
  if (best == Isa::kDotprod) all.push_back(best);
  constexpr std::size_t kRounds = 60;
  for (const Isa isa : all) {
    for (std::size_t round = 0; round < kRounds; ++round) {
      check_reached(isa);
      check_igemm(isa, round);
      check_depthwise(isa, round);
      check_pool(isa, round);
      check_send(isa, round);
      check_enter(isa, round);
    }
  }
  std::printf("%zu instruction sets, best %d, %zu rounds, %d failures\n", all.size(), static_cast<int>(best), kRounds,
              g_failures);
  return g_failures == 0 ? 0 : 1;
}
