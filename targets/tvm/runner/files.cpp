#include "files.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>

namespace onnxcomp {
namespace {

std::string reason() { return std::strerror(errno); }

// What the handlers read. It is complete before the first file is made and never changes after that.
std::atomic<const std::vector<std::string>*> removed{nullptr};

void remove_unfinished() {
  const std::vector<std::string>* const paths = removed;
  if (paths == nullptr) return;
  for (const std::string& path : *paths) unlink(path.c_str());
}

extern "C" void on_termination(int signal) {
  remove_unfinished();
  ::signal(signal, SIG_DFL);
  raise(signal);
}

extern "C" void on_fault(int signal) {
  remove_unfinished();
  const char* text = "onnxcomp-run: the compiled model failed: invalid access to memory\n";
  if (signal == SIGILL) {
    text = "onnxcomp-run: this CPU lacks an instruction that the artifact was compiled for\n";
  } else if (signal == SIGABRT) {
    text = "onnxcomp-run: the compiled model or its runtime gave up\n";
  }
  if (write(STDERR_FILENO, text, std::strlen(text)) < 0) _exit(3);
  _exit(3);
}

}  // namespace

Mapped::Mapped(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw BadInput("cannot read " + path + ": " + reason());
  struct stat about{};
  std::string problem;
  if (fstat(file, &about) != 0) {
    problem = reason();
  } else if (!S_ISREG(about.st_mode)) {
    problem = "it is not a file";
  } else if (about.st_size > 0) {
    size_ = static_cast<std::size_t>(about.st_size);
    void* const data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) {
      problem = reason();
    } else {
      data_ = static_cast<std::uint8_t*>(data);
    }
  }
  close(file);
  if (!problem.empty()) throw BadInput("cannot read " + path + ": " + problem);
}

Mapped::Mapped(Mapped&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapped::~Mapped() {
  if (data_ != nullptr) munmap(data_, size_);
}

void remove_at_signal(std::vector<std::string> paths) {
  static std::vector<std::string> kept;
  kept = std::move(paths);
  removed = &kept;
}

void handle_signals() {
  struct sigaction action{};
  sigemptyset(&action.sa_mask);
  action.sa_handler = on_termination;
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaction(signal, &action, nullptr);
  action.sa_handler = on_fault;
  std::set_terminate(std::abort);  // without a word of its own
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) sigaction(signal, &action, nullptr);
}

Output::Output(std::string temporary, std::string path) : temporary_(std::move(temporary)), path_(std::move(path)) {
  file_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file_ < 0) throw BadInput("cannot write " + path_ + ": " + reason());
}

Output::Output(Output&& other) noexcept
    : temporary_(std::move(other.temporary_)), path_(std::move(other.path_)), file_(std::exchange(other.file_, -1)) {}

Output::~Output() {
  if (file_ < 0) return;
  close(file_);
  unlink(temporary_.c_str());
}

void Output::write(const void* data, std::size_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(file_, from, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) throw BadInput("cannot write " + path_ + ": " + reason());
    from += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

void Output::commit() {
  const bool closed = close(std::exchange(file_, -1)) == 0;
  if (closed && rename(temporary_.c_str(), path_.c_str()) == 0) return;
  const std::string problem = reason();
  unlink(temporary_.c_str());
  throw BadInput("cannot write " + path_ + ": " + problem);
}

}  // namespace onnxcomp
