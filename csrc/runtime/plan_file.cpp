#include "runtime/plan_file.h"

#include <cstdlib>
#include <fstream>
#include <new>
#include <stdexcept>

#include "arithmetic.h"

namespace vpns {

void PlanFile::Free::operator()(uint8_t* bytes) const { std::free(bytes); }

PlanFile::PlanFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  size_ = static_cast<int64_t>(file.tellg());  // -1 where it could not be opened
  if (size_ >= 0) {
    bytes_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, round_up(size_ + 1, 64))));
    if (!bytes_) throw std::bad_alloc();
    file.seekg(0);
    file.read(reinterpret_cast<char*>(bytes_.get()), size_);
  }
  if (!file || size_ < 0) throw std::runtime_error("PlanFile: cannot read " + path);
}

}  // namespace vpns
