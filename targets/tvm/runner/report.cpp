#include "report.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "files.h"

namespace onnxcomp {
namespace {

double percentile(const std::vector<double>& sorted, double part) {
  const double at = part * static_cast<double>(sorted.size() - 1);
  const std::size_t below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (at - std::floor(at)) * (sorted[above] - sorted[below]);
}

std::string number(double value) {
  char out[32];
  std::snprintf(out, sizeof out, "%.4f", value);
  return out;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
      out += code;
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + '"';
}

std::string latency(std::vector<double> samples) {
  if (samples.empty()) return "null";
  std::sort(samples.begin(), samples.end());
  const double mean = std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size());
  return "{\"median\": " + number(percentile(samples, 0.5)) + ", \"p10\": " + number(percentile(samples, 0.1)) +
         ", \"p90\": " + number(percentile(samples, 0.9)) + ", \"p99\": " + number(percentile(samples, 0.99)) +
         ", \"min\": " + number(samples.front()) + ", \"mean\": " + number(mean) + "}";
}

// Of this program alone: what getrusage gives includes the process that started it.
std::int64_t peak_rss_bytes() {
  std::int64_t kib = 0;
  if (std::FILE* const status = std::fopen("/proc/self/status", "re")) {
    char line[256];
    while (std::fgets(line, sizeof line, status) != nullptr) {
      if (std::strncmp(line, "VmHWM:", 6) == 0) kib = std::atoll(line + 6);
    }
    std::fclose(status);
  }
  return kib * 1024;
}

std::string files(const Report& report) {
  std::string out;
  for (const auto& [name, file] : report.outputs) out += (out.empty() ? "" : ", ") + quoted(name) + ": " + quoted(file);
  return "{" + out + "}";
}

}  // namespace

void print(const Report& report) {
  std::printf(
      "{\"load_ms\": %s, \"first_ms\": %s, \"latency_ms\": %s, \"samples\": %zu, \"threads\": %lld, "
      "\"peak_rss_bytes\": %lld, \"steps\": %lld, \"outputs\": %s}\n",
      number(report.load_ms).c_str(), report.first_ms ? number(*report.first_ms).c_str() : "null",
      latency(report.samples).c_str(), report.samples.size(), static_cast<long long>(report.threads),
      static_cast<long long>(peak_rss_bytes()), static_cast<long long>(report.steps), files(report).c_str());
  if (std::fflush(stdout) != 0) throw BadInput(std::string("cannot write the result: ") + std::strerror(errno));
}

}  // namespace onnxcomp
