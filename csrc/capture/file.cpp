#include "file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

namespace dreamreader {

void File::create(const std::string& path) {
  close();
  path_ = path;
  constexpr int kFlags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC;
  handle_ = open(path.c_str(), kFlags | O_DIRECT, 0666);
  direct_ = O_DIRECT != 0 && handle_ >= 0;
  if (handle_ < 0 && errno == EINVAL) handle_ = open(path.c_str(), kFlags, 0666);
  if (handle_ < 0) throw FileError(errno, path);
}

void File::write(const char* from, int64_t bytes, int64_t at) {
  while (bytes > 0) {
    const bool direct = direct_;  // before the write: another thread may change it meanwhile
    const ssize_t written = pwrite(handle_, from, size_t(bytes), at);
    if (written >= 0) {
      from += written;
      bytes -= written;
      at += written;
      continue;
    }
    if (errno == EINTR) continue;
    // Some file systems refuse at the first write, and none takes the rest after a short one.
    if (errno != EINVAL || !direct) throw FileError(errno, path_);
    if (fcntl(handle_, F_SETFL, O_WRONLY) != 0) throw FileError(errno, path_);
    direct_ = false;
  }
}

void File::finish(int64_t bytes) {
  if (ftruncate(handle_, bytes) != 0 || fsync(handle_) != 0) throw FileError(errno, path_);
  const int handle = handle_;
  handle_ = -1;
  if (::close(handle) != 0) throw FileError(errno, path_);
}

void File::close() {
  if (handle_ >= 0) ::close(handle_);
  handle_ = -1;
}

}  // namespace dreamreader
