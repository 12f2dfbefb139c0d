// Workspace that is full of garbage and notices what is written beside it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace stts {

class GuardedBuffer {
  public:
    explicit GuardedBuffer(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kGuard, kGarbage) {}

    void* data() { return memory_.data() + kGuard; }

    bool isIntact() const {
        const auto isGarbage = [](uint8_t byte) { return byte == kGarbage; };
        const auto end = memory_.begin() + static_cast<ptrdiff_t>(kGuard + bytes_);
        return std::all_of(memory_.begin(), memory_.begin() + kGuard, isGarbage) &&
               std::all_of(end, memory_.end(), isGarbage);
    }

  private:
    static constexpr ptrdiff_t kGuard = 4096;
    static constexpr uint8_t kGarbage = 0xA5;

    size_t bytes_;
    std::vector<uint8_t> memory_;
};

}  // namespace stts
