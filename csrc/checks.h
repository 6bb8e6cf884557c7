// The one form of an error message: "<function>: expected <what>, got <value>".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace vpns {

template <typename Got>
[[noreturn]] inline void fail(const char* function, const std::string& expected, const Got& got) {
  std::ostringstream message;
  message << function << ": expected " << expected << ", got " << got;
  throw std::invalid_argument(message.str());
}

template <typename Got>
inline void check(bool holds, const char* function, const char* expected, const Got& got) {
  if (!holds) fail(function, expected, got);
}

}  // namespace vpns
