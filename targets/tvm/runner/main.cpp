// Runs an artifact of the TVM targets on a device: no Python, no toolkit, only TVM's runtime beside it.

#include <tvm/ffi/function.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "feeds.h"
#include "files.h"
#include "manifest.h"
#include "model.h"
#include "options.h"
#include "outputs.h"
#include "report.h"

namespace onnxcomp {
namespace {

namespace ffi = tvm::ffi;

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// Times runs beyond those whose outputs are written; they take the same inputs again and go on with the state.
std::vector<double> timed(Model& model, Feeds& feeds, const Options& options) {
  std::vector<double> samples;
  std::int64_t step = 0;
  const auto run = [&] {
    if (options.runs() > 1) feeds.fill(step++ % options.runs());
    const Clock::time_point start = Clock::now();
    model.call();
    const double ms = ms_since(start);
    model.advance();
    return ms;
  };
  for (std::int64_t i = 0; i < options.warmup; ++i) run();
  const Clock::time_point start = Clock::now();
  do {
    samples.push_back(run());
  } while ((options.repeat == 0 || static_cast<std::int64_t>(samples.size()) < options.repeat) &&
           (options.seconds == 0 || ms_since(start) < options.seconds * 1000));
  return samples;
}

Report run(const Options& options) {
  if (options.threads > 0) setenv("TVM_NUM_THREADS", std::to_string(options.threads).c_str(), 1);
  Report report;
  const Clock::time_point start = Clock::now();
  const Manifest manifest = read_manifest(options.artifact + "/manifest.json");
  Model model(options.artifact, manifest, options.check);
  report.load_ms = ms_since(start);
  report.threads = ffi::Function::GetGlobalRequired("runtime.NumThreads")().cast<std::int64_t>();
  if (options.check && options.inputs.empty() && !options.random) return report;
  Feeds feeds(manifest, options);
  for (std::size_t i = 0; i < manifest.inputs.size(); ++i) model.bind(i, feeds.tensor(i));
  Writer writer(manifest, options);
  report.steps = options.runs();
  for (std::int64_t step = 0; step < options.runs(); ++step) {
    feeds.fill(step);
    const Clock::time_point before = Clock::now();
    model.call();
    const double ms = ms_since(before);
    if (step == 0) {
      report.first_ms = ms;
    } else {
      report.samples.push_back(ms);
    }
    writer.add(model, step);
    model.advance();
  }
  writer.commit();
  for (std::size_t i = 0; i < writer.names().size(); ++i) {
    report.outputs.emplace_back(manifest.outputs[i], writer.names()[i]);
  }
  if (options.repeat > 0 || options.seconds > 0) report.samples = timed(model, feeds, options);
  return report;
}

int fail(int code, std::string problem) {
  for (char& c : problem) {
    if (static_cast<unsigned char>(c) < ' ') c = ' ';
  }
  std::fprintf(stderr, "onnxcomp-run: %.1000s\n", problem.c_str());
  return code;
}

}  // namespace
}  // namespace onnxcomp

int main(int count, char** words) {
  using namespace onnxcomp;
  handle_signals();
  try {
    const Options options = parse(count, words);
    if (options.help) {
      std::fputs(kUsage, stdout);
    } else {
      print(run(options));
    }
    return 0;
  } catch (const CannotLoad& error) {
    return fail(3, error.what());
  } catch (const BadInput& error) {
    return fail(2, error.what());
  } catch (const tvm::ffi::Error& error) {
    return fail(2, std::string(error.message()));
  } catch (const std::exception& error) {  // no memory
    return fail(2, error.what());
  }
}
