// What a thread of an emulated kernel may do: see emulator.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

int thread_index();
int block_index();
int block_count();
void *shared_memory(int tag, size_t bytes);

// Checks that device memory may be touched so; records a fault and gives false where it may not.
bool may_read(const void *from, size_t bytes, size_t alignment);
bool may_write(const void *to, size_t bytes);

// All 32 lanes of a warp hand in as many floats each; gives those of all lanes, one lane behind the other.
const float *exchange(const float *values, int count);
constexpr int EXCHANGED = 16;  // floats of a lane, at most

void sync_block();
void wait_for_dependency();
uint32_t add(uint32_t *word, uint32_t value);
uint32_t poll(const uint32_t *word);  // a second time with the same result only when the word has changed

}  // namespace emulator
