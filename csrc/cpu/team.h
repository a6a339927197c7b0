// Threads that share the chunks of a phase.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

namespace grasp {

// The next chunk of a range, alone in a cache line.
struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
};

// Work in `chunks` equal parts. Each member of the team has a range of consecutive chunks, so that it reads memory in
// one direction. A member that has finished its range takes chunks of the others, so a late or missing thread delays
// nobody.
class Phase {
  public:
    // `ranges` is storage for `members` ranges.
    void prepare(int64_t chunks, int members, Range *ranges) {
        chunks_ = chunks;
        members_ = members;
        ranges_ = ranges;
        done_.store(0, std::memory_order_relaxed);
        for (int i = 0; i < members; ++i) {
            new (ranges + i) Range{{chunks * i / members}, chunks * (i + 1) / members};
        }
    }

    // Runs chunks until none is left, then waits until all are finished. Their results can be read afterwards.
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
                std::this_thread::yield();  // the awaited thread may need this processor
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
