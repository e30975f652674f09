// Runs every kernel of every instruction set that this machine has over random sizes, in buffers without a byte to spare,
// and holds the results against sums in double precision. Built with sanitizers, or for another processor (see
// CMakeLists.txt and tests/native/test_kernels_check.py); prints what it ran and returns 1 on a failure.

#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/dense_f32.h"
#include "kernels/dots.h"
#include "kernels/joint.h"
#include "kernels/nm.h"
#include "kernels/rows_f32.h"
#include "kernels/rows_int4.h"
#include "kernels/rows_int8.h"
#include "kernels_check_delta.h"

namespace {

using namespace onnxcomp;

std::mt19937 g_random(1);
int g_failures = 0;

float normal() { return std::normal_distribution<float>()(g_random); }
std::size_t below(std::size_t limit) { return g_random() % limit; }

// Exactly as large as asked for, so that a sanitizer sees the first byte beyond.
template <typename T>
std::vector<T> make(std::size_t count, T (*one)()) {
  std::vector<T> made(count);
  for (T& value : made) value = one();
  made.shrink_to_fit();
  return made;
}

std::uint8_t byte() { return static_cast<std::uint8_t>(g_random()); }
std::int8_t signed_byte() { return static_cast<std::int8_t>(g_random()); }
std::uint8_t nibble() { return static_cast<std::uint8_t>(g_random() % 16); }
float positive() { return 0.01f + 0.1f * static_cast<float>(below(1000)) / 1000.0f; }
std::uint16_t half() { return static_cast<std::uint16_t>(0x2800 + below(0x800)); }

template <typename Scale>
Scale scale();
template <>
float scale<float>() {
  return positive();
}
template <>
std::uint16_t scale<std::uint16_t>() {
  return half();
}

// Inputs of which some are kept, with all orders of magnitude among them.
struct Inputs {
  std::vector<float> x;
  std::vector<float> values, sorted_values;
  std::vector<std::uint32_t> rows, sorted_rows;
  Kept kept, sorted;

  Inputs(std::size_t k, std::size_t round)
      : x(make(k, normal)), values(k), sorted_values(k), rows(k), sorted_rows(k) {
    if (round % 3 == 1) x[below(k)] *= 1e6f;
    if (round % 3 == 2) x[below(k)] *= 1e-30f;
    const float threshold = round % 4 == 0 ? -1.0f : 0.7f;
    const bool one_sided = round % 2 == 1;
    const std::size_t count = round % 5 == 4
                                  ? keep_largest(x.data(), k, 1 + below(k), values.data(), rows.data())
                                  : keep_above(x.data(), k, &threshold, 0, one_sided, values.data(), rows.data());
    kept = {values.data(), rows.data(), count};
    sort_by_exponent(kept, sorted_values.data(), sorted_rows.data());
    sorted = {sorted_values.data(), sorted_rows.data(), count};
  }
};

// `weight(row, column)` is in double precision; `share` of the root of the sum of squares may be missed, as a vector.
template <typename Weight>
void compare(const char* name, Isa isa, const Kept& kept, std::size_t columns, const float* y, double share,
             const Weight& weight) {
  double error = 0, spread = 0;
  for (std::size_t j = 0; j < columns; ++j) {
    double sum = 0;
    for (std::size_t i = 0; i < kept.count; ++i) {
      const double product = static_cast<double>(kept.values[i]) * weight(kept.rows[i], j);
      sum += product;
      spread += product * product;
    }
    error += (sum - static_cast<double>(y[j])) * (sum - static_cast<double>(y[j]));
  }
  if (!(error <= share * share * spread + 1e-20)) {
    std::printf("%s, isa %d, %zu inputs, %zu columns: error %g of %g\n", name, static_cast<int>(isa), kept.count,
                columns, std::sqrt(error), std::sqrt(spread));
    ++g_failures;
  }
}

constexpr double kExact = 1e-5, kRounded = 0.02;

void fail(const char* name, Isa isa) {
  std::printf("%s, isa %d\n", name, static_cast<int>(isa));
  ++g_failures;
}

// The same inputs survive as in the portable form, and the order by exponent is stable.
void check_select(Isa isa, std::size_t round) {
  const std::size_t k = 1 + below(100), step = round % 2;
  std::vector<float> x = make(k, normal);
  const std::vector<float> t = make(step == 0 ? 1 : k, normal);
  for (const float odd : {NAN, INFINITY, -INFINITY, t[0], -0.0f}) x[below(k)] = odd;
  std::vector<float> values[2] = {std::vector<float>(k), std::vector<float>(k)};
  std::vector<std::uint32_t> rows[2] = {std::vector<std::uint32_t>(k), std::vector<std::uint32_t>(k)};
  std::size_t kept[2];
  for (const int i : {0, 1}) {
    const KeepAbove keep = i == 0 ? keep_above : choose_keep_above(isa);
    kept[i] = keep(x.data(), k, t.data(), step, round % 3 == 0, values[i].data(), rows[i].data());
  }
  if (kept[0] != kept[1]) return fail("number of inputs above a threshold", isa);
  for (std::size_t i = 0; i < kept[0]; ++i) {
    if (rows[0][i] != rows[1][i] || std::memcmp(&values[0][i], &values[1][i], sizeof(float)) != 0) {
      return fail("inputs above a threshold", isa);
    }
  }
  sort_by_exponent({values[0].data(), rows[0].data(), kept[0]}, values[1].data(), rows[1].data());
  const auto exponent = [&x](std::uint32_t row) { return magnitude_bits(x[row]) >> 23; };
  std::stable_sort(rows[0].begin(), rows[0].begin() + static_cast<std::ptrdiff_t>(kept[0]),
                   [&](std::uint32_t a, std::uint32_t b) { return exponent(a) > exponent(b); });
  for (std::size_t i = 0; i < kept[0]; ++i) {
    if (rows[0][i] != rows[1][i] || std::memcmp(&x[rows[1][i]], &values[1][i], sizeof(float)) != 0) {
      return fail("inputs in order of exponent", isa);
    }
  }
}

void check_f32(Isa isa, std::size_t round) {
  const std::size_t k = 1 + below(150), n = 1 + below(300);
  const Inputs in(k, round);
  const std::vector<float> w = make(k * n, normal);
  const auto weight = [&](std::size_t r, std::size_t j) { return static_cast<double>(w[r * n + j]); };
  std::vector<float> y(n);
  rows_f32::choose(isa)(w.data(), n, in.kept, y.data(), n);
  compare("rows f32", isa, in.kept, n, y.data(), kExact, weight);
}

void check_dense(Isa isa) {
  const dense_f32::Kernel kernel = dense_f32::choose(isa);
  if (kernel == nullptr) return;
  const std::size_t k = 1 + below(600), n = 1 + below(64), batch = 1 + below(9), step = n + below(5);
  const bool turned = below(2) == 1;
  const std::size_t row_step = turned ? 1 : n, column_step = turned ? k : 1;
  const std::vector<float> w = make(k * n, normal), x = make(batch * k, normal);
  std::vector<float> y((batch - 1) * step + n);
  kernel({w.data(), row_step, column_step}, x.data(), k, batch, n, y.data(), step);
  std::vector<std::uint32_t> all(k);
  for (std::size_t j = 0; j < k; ++j) all[j] = static_cast<std::uint32_t>(j);
  for (std::size_t b = 0; b < batch; ++b) {
    compare("dense f32", isa, {x.data() + b * k, all.data(), k}, n, y.data() + b * step, kExact,
            [&](std::size_t i, std::size_t j) { return static_cast<double>(w[i * row_step + j * column_step]); });
  }
}

// Several inputs at once: each against its sum, and against what it comes to in another batch. `kernel(in, y, y_step)`.
template <typename Kernel, typename Weight>
void check_joint(const char* name, Isa isa, std::size_t most, std::size_t k, std::size_t n, std::size_t round,
                 const Kernel& kernel, const Weight& weight) {
  const std::size_t count = 1 + below(round % 10 == 9 ? most : std::min<std::size_t>(most, 9)), step = n + below(3);
  const float threshold = round % 4 == 0 ? -1.0f : round % 4 == 1 ? INFINITY : 0.7f;
  const std::size_t all_dropped = below(count);
  std::vector<float> x = make(count * k, normal);
  if (round % 3 == 1) x[below(count * k)] *= 1e6f;
  if (round % 3 == 2) x[below(count * k)] *= 1e-30f;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::fabs(x[i]) <= threshold || (round % 2 == 1 && i / k == all_dropped)) x[i] = 0.0f;
  }
  std::vector<float> y((count - 1) * step + n, NAN), alone(n);
  kernel({x.data(), k, count}, y.data(), step);
  std::vector<std::uint32_t> all(k);
  for (std::size_t j = 0; j < k; ++j) all[j] = static_cast<std::uint32_t>(j);
  for (std::size_t b = 0; b < count; ++b) {
    const float* found = y.data() + b * step;
    compare(name, isa, {x.data() + b * k, all.data(), k}, n, found, kRounded, weight);
    kernel({x.data() + b * k, k, 1}, alone.data(), n);
    if (std::memcmp(alone.data(), found, n * sizeof(float)) != 0) fail(name, isa);
    if (b + 1 < count && n < step && !std::isnan(found[n])) fail(name, isa);
  }
}

void check_int8(Isa isa, std::size_t round) {
  const std::size_t k = 1 + below(300), n = 1 + below(300);
  const Inputs in(k, round);
  const std::vector<std::int8_t> w = make(k * n, signed_byte);
  const std::vector<float> s = make(n, positive);
  const auto weight = [&](std::size_t r, std::size_t j) {
    return static_cast<double>(w[r * n + j]) * static_cast<double>(s[j]);
  };
  const rows_int8::Weight view{w.data(), n, s.data()};
  std::vector<float> y(n);
  rows_int8::choose_exact(isa)(view, in.kept, y.data(), n);
  compare("rows int8 exact", isa, in.kept, n, y.data(), kExact, weight);
  if (const rows_int8::Summed kernel = rows_int8::choose_rounded(isa)) {
    std::vector<std::uint32_t> memory((rows_int8::rounded_bytes(k) + 3) / 4);
    kernel(view, rows_int8::round(in.sorted, k, memory.data()), y.data(), n);
    compare("rows int8 rounded", isa, in.kept, n, y.data(), kRounded, weight);
  }
  if (const joint::Int8 kernel = joint::choose_int8(isa)) {
    const auto several = [&](const joint::Inputs& some, float* to, std::size_t step) {
      kernel(view, some, to, step, n);
    };
    check_joint("joint int8", isa, joint::kMostInt8, k, n, round, several, weight);
  }
}

template <typename Scale>
void check_int4(Isa isa, std::size_t round) {
  const std::size_t k = 1 + below(200), groups = 1 + below(20), n = groups * 32, stride = round % 2 == 0 ? 0 : groups;
  const Inputs in(k, round);
  const std::vector<std::uint8_t> w = make(k * n / 2, byte), z = make(stride == 0 ? 1 : k * groups, nibble);
  const std::vector<Scale> s = make(k * groups, scale<Scale>);
  const auto weight = [&](std::size_t r, std::size_t j) {
    const int pair = w[(r * n + j) / 2], code = j % 2 == 0 ? pair & 15 : pair >> 4;
    const int zero = stride == 0 ? z[0] : z[r * groups + j / 32];
    return static_cast<double>(to_float(s[r * groups + j / 32])) * (code - zero);
  };
  const rows_int4::Weight<Scale> view{w.data(), n / 2, s.data(), z.data(), stride, groups};
  std::vector<float> y(n);
  rows_int4::choose_exact<Scale>(isa)(view, in.kept, y.data(), groups);
  compare("rows int4 exact", isa, in.kept, n, y.data(), kExact, weight);
  if (const rows_int4::Kernel<Scale> kernel = rows_int4::choose_rounded<Scale>(isa)) {
    kernel(view, in.sorted, y.data(), groups);
    compare("rows int4 rounded", isa, in.kept, n, y.data(), kRounded, weight);
  }
  if (const joint::Int4<Scale> kernel = joint::choose_int4<Scale>(isa)) {
    const auto several = [&](const joint::Inputs& some, float* to, std::size_t step) {
      kernel(view, some, to, step, groups);
    };
    check_joint("joint int4", isa, joint::kMostInt4, k, n, round, several, weight);
  }
}

// `at(row, column)` of a matrix with rows of `k`; a product of one input with the kept rows is one of the rows' values
// with a matrix of one column for each.
template <typename W, typename At>
void check_dots(const char* name, Isa isa, const W& w, std::size_t f, std::size_t k, bool split, std::size_t round,
                const At& at) {
  const Inputs gates(f, round);
  const std::vector<float> x = make(k, normal);
  std::vector<std::uint32_t> all(k);
  for (std::size_t j = 0; j < k; ++j) all[j] = static_cast<std::uint32_t>(j);
  const Kept every{x.data(), all.data(), k};
  std::vector<float> out(f);
  const auto weight = [&](std::size_t j, std::size_t i) {
    return static_cast<double>(gates.kept.values[i]) * at(gates.kept.rows[i], j);
  };
  dots::choose_exact<W>(isa)(w, x.data(), k, gates.kept, out.data());
  compare(name, isa, every, gates.kept.count, out.data(), kExact, weight);
  if constexpr (!std::is_same_v<W, dots::F32>) {
    if (const dots::Rounded<W> kernel = dots::choose_rounded<W>(isa)) {
      void* memory = std::aligned_alloc(64, (dots::input_bytes(k) + 63) / 64 * 64);
      dots::Input input;
      if (!dots::round(x.data(), k, split, memory, &input)) ++g_failures;
      kernel(w, input, k, gates.kept, out.data());
      compare(name, isa, every, gates.kept.count, out.data(), kRounded, weight);
      std::free(memory);
    }
  }
}

void check_all_dots(Isa isa, std::size_t round) {
  const std::size_t f = 1 + below(60), k = 1 + below(300);
  const std::vector<float> w = make(f * k, normal), s = make(f, positive);
  check_dots("dots f32", isa, dots::F32{w.data()}, f, k, false, round,
             [&](std::size_t r, std::size_t j) { return static_cast<double>(w[r * k + j]); });
  const std::vector<std::int8_t> w8 = make(f * k, signed_byte);
  check_dots("dots int8", isa, dots::Int8{w8.data(), s.data()}, f, k, false, round, [&](std::size_t r, std::size_t j) {
    return static_cast<double>(w8[r * k + j]) * static_cast<double>(s[r]);
  });
  const std::size_t groups = 1 + below(40), k4 = groups * 32, stride = round % 2 == 0 ? 0 : groups;
  const std::vector<std::uint8_t> w4 = make(f * k4 / 2, byte), z = make(stride == 0 ? 1 : f * groups, nibble);
  const std::vector<std::uint16_t> s4 = make(f * groups, half);
  const dots::Int4<std::uint16_t> int4{w4.data(), s4.data(), z.data(), stride};
  check_dots("dots int4", isa, int4, f, k4, true, round, [&](std::size_t r, std::size_t j) {
    const int pair = w4[(r * k4 + j) / 2], code = j % 2 == 0 ? pair & 15 : pair >> 4;
    const int zero = stride == 0 ? z[0] : z[r * groups + j / 32];
    return static_cast<double>(to_float(s4[r * groups + j / 32])) * (code - zero);
  });
}

// N:M weights in blocks with all bits of padding set at random, against sums over their slots.
template <typename Value, typename X>
void check_nm(const char* name, Isa isa, double share, std::size_t round, Value (*one)(), nm::Kernel<Value, X> kernel,
              nm::Round to_integers = nullptr, std::uint8_t flip = 0) {
  constexpr bool kRound = std::is_same_v<X, std::uint8_t>;
  const std::size_t kept = 1 + round % 2, k = 1 + below(round % 5 == 0 ? 600 : 60), n = 1 + below(70);
  const std::size_t quads = nm::quads_of(k, kept), length = quads * nm::quad_inputs(kept);
  const std::size_t blocks = (n + nm::kColumns - 1) / nm::kColumns, spans = (length + nm::kSpan - 1) / nm::kSpan;
  const std::size_t count = 1 + below(round % 3 == 0 ? 20 : 5), step = n + below(3);
  const std::vector<Value> values = make(blocks * quads * nm::kQuad * nm::kColumns, one);
  const std::vector<std::uint8_t> places = make(blocks * quads * nm::kColumns, byte);
  const std::vector<float> bias = make(n, normal), scale = make(n, positive);
  std::vector<float> x = make(count * k, normal), padded(count * length);
  // No outliers beside which the others round to nothing: it may be that no slot of a column selects them.
  if (round % 4 == 1 && !kRound) x[below(count * k)] *= 1e6f;
  if (round % 4 == 2) x[below(count * k)] *= 1e-30f;
  std::vector<X> given(count * length);
  std::vector<float> steps(count * spans);
  for (std::size_t r = 0; r < count; ++r) {
    std::copy_n(x.data() + r * k, k, padded.data() + r * length);
    if constexpr (kRound) {
      to_integers(x.data() + r * k, k, length, flip, given.data() + r * length, steps.data() + r * spans);
    } else {
      std::copy_n(padded.data() + r * length, length, given.data() + r * length);
    }
  }
  std::vector<float> y((count - 1) * step + n, NAN);
  const nm::Weight<Value> w{values.data(), places.data(), bias.data(), kRound ? scale.data() : nullptr, quads, n, kept};
  const std::size_t middle = below(blocks + 1);
  kernel(w, {given.data(), length, count, steps.data(), spans}, y.data(), step, 0, middle);
  kernel(w, {given.data(), length, count, steps.data(), spans}, y.data(), step, middle, blocks);
  for (std::size_t r = 0; r < count; ++r) {
    double error = 0, spread = 0;
    for (std::size_t j = 0; j < n; ++j) {
      const std::size_t block = j / nm::kColumns, c = j % nm::kColumns;
      double sum = static_cast<double>(bias[j]);
      for (std::size_t s = 0; s < quads * nm::kQuad; ++s) {
        const std::size_t q = block * quads + s / nm::kQuad;
        const std::size_t at = kRound ? c * nm::kQuad + s % nm::kQuad : s % nm::kQuad * nm::kColumns + c;
        const std::size_t place = places[q * nm::kColumns + c] >> (2 * (s % nm::kQuad)) & 3;
        double value = 0;
        if constexpr (kRound) {
          value = static_cast<double>(values[q * nm::kQuad * nm::kColumns + at]) * static_cast<double>(scale[j]);
        } else {
          value = static_cast<double>(to_float(values[q * nm::kQuad * nm::kColumns + at]));
        }
        const double product = value * static_cast<double>(padded[r * length + s / kept * 4 + place]);
        sum += product;
        spread += product * product;
      }
      spread += static_cast<double>(bias[j]) * static_cast<double>(bias[j]);
      const double miss = sum - static_cast<double>(y[r * step + j]);
      error += miss * miss;
    }
    if (!(error <= share * share * spread + 1e-20)) {
      std::printf("%s, isa %d, %zu:4, %zu inputs, %zu columns, row %zu of %zu: error %g of %g\n", name,
                  static_cast<int>(isa), kept, k, n, r, count, std::sqrt(error), std::sqrt(spread));
      ++g_failures;
    }
    if (r + 1 < count && n < step && !std::isnan(y[r * step + n])) fail(name, isa);
  }
}

}  // namespace

int main() {
  const Isa best = choose_isa();
  std::vector<Isa> all = {Isa::kPortable};
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kVnni}) {
    if (best != Isa::kDotprod && isa <= best) all.push_back(isa);
  }
  if (best == Isa::kDotprod) all.push_back(best);
  constexpr std::size_t kRounds = 40;
  for (const Isa isa : all) {
    for (std::size_t round = 0; round < kRounds; ++round) {
      check_select(isa, round);
      check_f32(isa, round);
      g_failures += delta_check::run(isa, round);
      check_dense(isa);
      check_int8(isa, round);
      check_int4<float>(isa, round);
      check_int4<std::uint16_t>(isa, round);
      check_all_dots(isa, round);
      check_nm<float, float>("nm f32", isa, kExact, round, normal, nm::choose_float<float>(isa));
      check_nm<std::uint16_t, float>("nm f16", isa, kExact, round, half, nm::choose_float<std::uint16_t>(isa));
      const nm::Int8 int8 = nm::choose_int8(isa);
      check_nm<std::int8_t, std::uint8_t>("nm int8", isa, kRounded, round, signed_byte, int8.multiply,
                                        int8.round, int8.flip);
    }
  }
  std::printf("%zu instruction sets, best %d, %zu rounds, %d failures\n", all.size(), static_cast<int>(best), kRounds,
              g_failures);
  return g_failures == 0 ? 0 : 1;
}
