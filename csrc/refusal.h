// Calls that a kernel leaves to another back end (dreamreader/_register.py knows to which), and
// those for which there is no memory.
#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace dreamreader {

// The kernel does not take these sizes or types. Nothing was written.
struct NotTaken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The build has no code that this device or its driver runs. Nothing was written.
struct NoCode : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfMemory : std::bad_alloc {
  explicit OutOfMemory(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

}  // namespace dreamreader
