#include "options.h"

#include <cerrno>
#include <cmath>
#include <cstdlib>

#include "files.h"

namespace onnxcomp {
namespace {

constexpr std::int64_t kMax = 1'000'000'000;

std::int64_t whole(const std::string& option, const std::string& text, std::int64_t least, std::int64_t most = kMax) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < least || value > most) {
    throw BadInput(option + " takes a whole number from " + std::to_string(least) + " to " + std::to_string(most) +
                   ", not '" + text + "'");
  }
  return value;
}

double positive(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value) || value <= 0) {
    throw BadInput(option + " takes a positive number, not '" + text + "'");
  }
  return value;
}

}  // namespace

const char* const kUsage =
    "Runs an artifact of onnxcomp's tvm-cpu target and prints one JSON object.\n"
    "\n"
    "  onnxcomp-run ARTIFACT [options]\n"
    "\n"
    "  --input NAME=FILE.npy  array of an input; once for each of them\n"
    "  --random               fill the inputs that have none with a fixed pattern\n"
    "  --steps N              run N times; arrays have a first axis of N, and streaming state is carried\n"
    "  --out DIR              write the outputs as .npy files\n"
    "  --repeat N             then time N more runs of the same inputs; else the steps after the first are timed\n"
    "  --seconds S            then time runs for S seconds, or until N of --repeat\n"
    "  --warmup N             runs before those that are timed (3)\n"
    "  --threads N            threads of TVM's pool\n"
    "  --check                compare the SHA-256 of the files with the manifest; without inputs, only load\n"
    "\n"
    "Exit code: 0 done, 2 bad input or artifact, 3 the artifact cannot be loaded here.\n";

Options parse(int count, char** words) {
  Options out;
  int at = 1;
  const auto value = [&](const std::string& option) {
    if (++at >= count) throw BadInput(option + " needs a value");
    return std::string(words[at]);
  };
  for (; at < count; ++at) {
    const std::string word = words[at];
    if (word == "--help" || word == "-h") {
      out.help = true;
    } else if (word == "--input") {
      out.inputs.push_back(value(word));
    } else if (word == "--out") {
      out.out = value(word);
    } else if (word == "--steps") {
      out.steps = whole(word, value(word), 1);
    } else if (word == "--warmup") {
      out.warmup = whole(word, value(word), 0);
    } else if (word == "--repeat") {
      out.repeat = whole(word, value(word), 0);
    } else if (word == "--threads") {
      out.threads = whole(word, value(word), 1, 1024);
    } else if (word == "--seconds") {
      out.seconds = positive(word, value(word));
    } else if (word == "--random") {
      out.random = true;
    } else if (word == "--check") {
      out.check = true;
    } else if (word.rfind("-", 0) == 0 || !out.artifact.empty()) {
      throw BadInput("unknown argument '" + word + "'; see --help");
    } else {
      out.artifact = word;
    }
  }
  if (out.artifact.empty() && !out.help) throw BadInput("no artifact is given; see --help");
  return out;
}

}  // namespace onnxcomp
