// The memory of a call.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace grasp {

// The memory of a calling thread, reused by its next call.
class Arena {
  public:
    ~Arena() { std::free(data_); }

    // At least `bytes`, aligned to a cache line; null if there is no memory.
    char *get(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = static_cast<char *>(std::aligned_alloc(64, size_));
            if (data_ == nullptr) size_ = 0;
        }
        return data_;
    }

  private:
    char *data_ = nullptr;
    int64_t size_ = 0;
};

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The layout of a call's memory; with a null base it only counts bytes.
class Layout {
  public:
    explicit Layout(char *base) : base_(base) {}
    char *take(int64_t bytes) {
        char *at = base_ ? base_ + used_ : nullptr;
        used_ += aligned(bytes);
        return at;
    }
    int64_t used() const { return used_; }

  private:
    char *base_;
    int64_t used_ = 0;
};

}  // namespace grasp
