// Threads that share the chunks of a phase.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

namespace grasp {

// The next of a range of chunks; a cache line of its own.
struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
};

// Work in `chunks` equal parts. Each member of the team has a range of consecutive chunks, so that it reads memory in
// one direction, and helps the others when its own is done: a thread that comes late, or never, holds nobody up.
class Phase {
  public:
    // `ranges` is storage for `members`.
    void prepare(int64_t chunks, int members, Range *ranges) {
        chunks_ = chunks;
        members_ = members;
        ranges_ = ranges;
        done_.store(0, std::memory_order_relaxed);
        for (int i = 0; i < members; ++i) {
            new (ranges + i) Range{{chunks * i / members}, chunks * (i + 1) / members};
        }
    }

    // Does chunks until none is left to begin, then waits until all are done; what they wrote can be read after that.
    template <class Function>
    void work(int member, Function &&do_chunk) {
        for (int i = 0; i < members_; ++i) {
            Range &range = ranges_[(member + i) % members_];
            int64_t chunk;
            while ((chunk = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end) {
                do_chunk(chunk);
                done_.fetch_add(1, std::memory_order_release);
            }
        }
        for (int64_t spins = 0; done_.load(std::memory_order_acquire) < chunks_; ++spins) {
            if (spins < SPINS) {
                pause();
            } else {
                std::this_thread::yield();  // the thread that is waited for may need this processor
            }
        }
    }

  private:
    static constexpr int64_t SPINS = 1000;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

    int64_t chunks_ = 0;
    int members_ = 0;
    Range *ranges_ = nullptr;
    alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace grasp
