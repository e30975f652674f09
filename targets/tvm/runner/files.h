// Files as the runner needs them: mapped to be read, and written under another name until they are complete.

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace onnxcomp {

// An input, an option or an artifact that is not as it has to be.
struct BadInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An artifact that this machine cannot load.
struct CannotLoad : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file in memory that is read when it is touched; nothing is copied. Empty files have no address.
class Mapped {
 public:
  explicit Mapped(const std::string& path);
  Mapped(Mapped&& other) noexcept;
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped();

  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

// Names of files that are removed when a signal ends the process. Called once, before the first of them is made.
void remove_at_signal(std::vector<std::string> paths);

// Lets termination remove unfinished files, and makes one line of an invalid access or instruction.
void handle_signals();

// A file under a temporary name, which is its own after `commit` and is gone without it.
class Output {
 public:
  Output(std::string temporary, std::string path);
  Output(Output&& other) noexcept;
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output();

  void write(const void* data, std::size_t bytes);
  void commit();

 private:
  std::string temporary_, path_;
  int file_ = -1;
};

}  // namespace onnxcomp
