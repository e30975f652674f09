// The part of kernels_check.cpp for what delta networks need: changes of a row, and the gates of recurrent cells.

#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/delta_rows.h"
#include "kernels/gates.h"

namespace onnxcomp::delta_check {

inline std::mt19937 g_random(2);

inline std::size_t below(std::size_t limit) { return g_random() % limit; }

// Exactly as large as asked for, so that a sanitizer sees the first byte beyond.
inline std::vector<float> normal(std::size_t count, float scale = 1.0f) {
  std::vector<float> made(count);
  for (float& value : made) value = scale * std::normal_distribution<float>()(g_random);
  made.shrink_to_fit();
  return made;
}

inline bool same(const float* a, const float* b, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i, b + i, sizeof(float)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

inline int report(const char* name, Isa isa, std::size_t size) {
  std::printf("%s, isa %d, %zu elements\n", name, static_cast<int>(isa), size);
  return 1;
}

// Against a plain list; in place as well, with all and none sent, and with what is not finite.
inline int check_select(Isa isa, std::size_t round) {
  const std::size_t k = 1 + below(100), t_step = round % 2;
  std::vector<float> x = normal(k), last = normal(k), t = normal(t_step == 0 ? 1 : k);
  const float limits[] = {-1.0f, 0.0f, INFINITY};
  for (float& limit : t) limit = round % 5 < 3 ? limits[round % 5] : std::fabs(limit);
  for (std::size_t i = 0; i < k; ++i) x[i] = below(3) == 0 ? last[i] : x[i];
  if (round % 4 == 0) x[below(k)] = NAN;
  if (round % 4 == 1) last[below(k)] = below(2) == 0 ? INFINITY : -INFINITY;
  if (round % 8 == 2) t[below(t.size())] = NAN;
  std::vector<float> values, expected(k);
  std::vector<std::uint32_t> rows;
  bool finite = true;
  for (std::size_t i = 0; i < k; ++i) {
    const float d = x[i] - last[i];
    const bool small = std::fabs(d) <= t[i * t_step];
    finite = finite && std::isfinite(d);
    expected[i] = small ? last[i] : x[i];
    if (small) continue;
    values.push_back(d);
    rows.push_back(static_cast<std::uint32_t>(i));
  }
  int failures = 0;
  std::vector<float> out(k), found(k), place = last;
  std::vector<std::uint32_t> found_rows(k);
  const delta_rows::Select kernel = delta_rows::choose_select(isa);
  for (float* to : {out.data(), place.data()}) {
    const float* before = to == out.data() ? last.data() : to;
    const delta_rows::Changes changes =
        kernel(x.data(), before, k, t.data(), t_step, to, found.data(), found_rows.data());
    if (changes.count != rows.size() || changes.finite != finite || !same(to, expected.data(), k) ||
        !same(found.data(), values.data(), rows.size()) ||
        !std::equal(rows.begin(), rows.end(), found_rows.begin())) {
      failures += report("changes", isa, k);
    }
  }
  return failures;
}

// Equal bits: what has not changed must not seem to.
inline int check_quantize(Isa isa, std::size_t round) {
  const std::size_t k = 1 + below(100), step_step = round % 2;
  std::vector<float> x = normal(k, round % 3 == 0 ? 1e7f : 1.0f), step = normal(step_step == 0 ? 1 : k), y(k);
  if (step_step == 0) *step.data() = std::fabs(step[0]) + 0.01f;
  x[below(k)] = 2.5f * step[0];
  x[below(k)] = -0.5f * step[0];
  if (round % 4 == 0) x[below(k)] = NAN;
  if (round % 4 == 1) x[below(k)] = -INFINITY;
  if (round % 8 == 3) step[step.size() - 1] = step_step == 0 ? INFINITY : NAN;
  delta_rows::choose_quantize(isa)(x.data(), k, step.data(), step_step, y.data());
  std::vector<float> expected(k);
  for (std::size_t i = 0; i < k; ++i) {
    const float s = step[i * step_step], whole = std::nearbyint(x[i] / s);
    expected[i] = s > 0.0f ? whole * s : x[i];
    if (expected[i] == y[i]) expected[i] = y[i];  // zeros of either sign
  }
  return same(y.data(), expected.data(), k) ? 0 : report("multiples of a step", isa, k);
}

inline int check_finite(Isa isa) {
  std::vector<float> x = normal(1 + below(100), 1e30f);
  int failures = delta_rows::all_finite(x.data(), x.size()) ? 0 : report("finite", isa, x.size());
  for (const float odd : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> y = x;
    y[below(y.size())] = odd;
    if (delta_rows::all_finite(y.data(), y.size())) failures += report("not finite", isa, x.size());
  }
  return failures;
}

inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// Both NaN, or close to each other.
inline bool near(float found, double expected) {
  if (std::isnan(expected)) return std::isnan(found);
  return std::fabs(static_cast<double>(found) - expected) <= 2e-6 * (1.0 + std::fabs(expected));
}

// Sums of all magnitudes, among them infinite ones and NaN; the states in place with the same bits.
inline int check_gates(Isa isa, std::size_t round) {
  const std::size_t n = 1 + below(150);
  const float scale = round % 4 == 0 ? 30.0f : 1.0f;
  std::vector<float> a = normal(4 * n, scale), b = normal(4 * n), c = normal(4 * n), d = normal(4 * n);
  for (std::vector<float>* odd : {&a, &b}) {
    if (round % 3 != 0) continue;
    (*odd)[below(4 * n)] = INFINITY;
    (*odd)[below(4 * n)] = NAN;
  }
  std::vector<float> h = normal(n), cell = normal(n), y(n), y_cell(n);
  int failures = 0;
  const auto w = [](float value) { return static_cast<double>(value); };

  // The arrays of a GRU end where three gates do.
  std::vector<float> x3(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(3 * n));
  std::vector<float> h3(b.begin(), b.begin() + static_cast<std::ptrdiff_t>(3 * n));
  std::vector<float> bx(c.begin(), c.begin() + static_cast<std::ptrdiff_t>(3 * n));
  std::vector<float> bh(d.begin(), d.begin() + static_cast<std::ptrdiff_t>(3 * n));
  for (std::vector<float>* v : {&x3, &h3, &bx, &bh}) v->shrink_to_fit();
  const gates::GruKernel gru = gates::choose_gru(isa);
  gru({x3.data(), h3.data(), bx.data(), bh.data(), h.data()}, n, y.data());
  for (std::size_t i = 0; i < n; ++i) {
    const auto sum = [&](std::size_t g) { return w(x3[g * n + i]) + w(bx[g * n + i]); };
    const auto state = [&](std::size_t g) { return w(h3[g * n + i]) + w(bh[g * n + i]); };
    const double z = sigmoid(sum(0) + state(0)), r = sigmoid(sum(1) + state(1));
    // 0 * infinity: the double sigmoid is never quite 0 where the float one is.
    if (std::isinf(h3[2 * n + i])) continue;
    if (!near(y[i], (1.0 - z) * std::tanh(sum(2) + r * state(2)) + z * w(h[i]))) failures += report("GRU", isa, n);
  }
  std::vector<float> place = h;
  gru({x3.data(), h3.data(), bx.data(), bh.data(), place.data()}, n, place.data());
  if (!same(place.data(), y.data(), n)) failures += report("GRU in place", isa, n);

  const gates::LstmKernel lstm = gates::choose_lstm(isa);
  lstm({a.data(), c.data(), cell.data()}, n, y.data(), y_cell.data());
  for (std::size_t i = 0; i < n; ++i) {
    const auto sum = [&](std::size_t g) { return w(a[g * n + i]) + w(c[g * n + i]); };
    const double next = sigmoid(sum(2)) * w(cell[i]) + sigmoid(sum(0)) * std::tanh(sum(3));
    if (!near(y_cell[i], next) || !near(y[i], sigmoid(sum(1)) * std::tanh(next))) failures += report("LSTM", isa, n);
  }
  place = cell;
  lstm({a.data(), c.data(), place.data()}, n, h.data(), place.data());
  if (!same(place.data(), y_cell.data(), n) || !same(h.data(), y.data(), n)) {
    failures += report("LSTM in place", isa, n);
  }
  return failures;
}

// Returns the number of failures.
inline int run(Isa isa, std::size_t round) {
  return check_select(isa, round) + check_quantize(isa, round) + check_finite(isa) + check_gates(isa, round);
}

}  // namespace onnxcomp::delta_check
