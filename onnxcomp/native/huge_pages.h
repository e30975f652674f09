// Large weights in pages of 2 MiB, where the system gives them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace onnxcomp {

// Asks the system to move what lies there into huge pages; the content and the addresses stay as they are. It does so at
// once (since Linux 6.1), in the course of time, or not at all, as with most memory that is mapped from a file. Off with
// ONNXCOMP_HUGE_PAGES=0.
inline void move_to_huge_pages(const void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  const char* wish = std::getenv("ONNXCOMP_HUGE_PAGES");
  if (wish != nullptr && std::strcmp(wish, "0") == 0) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin >= end) return;
  void* first = reinterpret_cast<void*>(begin);
  if (madvise(first, end - begin, MADV_HUGEPAGE) == 0) madvise(first, end - begin, kCollapse);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace onnxcomp
