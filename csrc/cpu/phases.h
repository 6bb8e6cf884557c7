// Where does a call spend its time? Costs nothing unless the caller asks (ConvCall::phases).
#pragma once

#include <array>
#include <chrono>

#include "params.h"

namespace vpns {

enum Phase : int { kLayout = 0, kProducts = 1, kStores = 2 };

// One thread's clock; what it counted reaches the call when it is destroyed, inside the parallel region.
class PhaseClock {
 public:
  explicit PhaseClock(const ConvCall& call) : call_(call) {
    if (call_.phases != nullptr) last_ = Clock::now();
  }
  PhaseClock(const PhaseClock&) = delete;
  PhaseClock& operator=(const PhaseClock&) = delete;
  ~PhaseClock() {
    if (call_.phases == nullptr) return;
#pragma omp critical(vpns_phases)
    for (int phase = 0; phase < 3; ++phase) call_.phases[phase] += seconds_[phase] / call_.threads;
  }

  // What has passed since the last call of this belonged to `phase`.
  void ends(Phase phase) {
    if (call_.phases == nullptr) return;
    const Clock::time_point now = Clock::now();
    seconds_[phase] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  const ConvCall& call_;
  Clock::time_point last_;
  std::array<double, 3> seconds_{};
};

}  // namespace vpns
