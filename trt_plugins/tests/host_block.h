// A block of one thread: plan.cuh as ordinary serial code.
#pragma once

#include <cstdint>

namespace stts {

class HostBlock {
  public:
    struct Scan {
        int32_t before;
        int32_t total;
    };

    int32_t thread() const { return 0; }
    int32_t size() const { return 1; }
    void sync() const {}
    Scan exclusiveScan(int32_t value) const { return {0, value}; }
    void count(int32_t* histogram, int32_t bucket) const {
        if (bucket >= 0) ++histogram[bucket];
    }
};

}  // namespace stts
