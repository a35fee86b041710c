// A file that is written in whole blocks past the page cache, where the file system allows it.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace dreamreader {

// What the system said about a file.
struct FileError : std::runtime_error {
  FileError(int number, std::string path)
      : std::runtime_error(path), number(number), path(std::move(path)) {}
  int number;  // errno
  std::string path;
};

class File {
 public:
  File() = default;
  ~File() { close(); }
  File(const File&) = delete;

  void create(const std::string& path);
  bool is_open() const { return handle_ >= 0; }
  bool direct() const { return direct_; }

  // Addresses, lengths and places must be multiples of kBlock.
  void write(const char* from, int64_t bytes, int64_t at);
  void finish(int64_t bytes);  // cuts it to its length and waits for the disk
  void close();

 private:
  int handle_ = -1;
  std::atomic<bool> direct_{false};  // several threads write
  std::string path_;
};

}  // namespace dreamreader
