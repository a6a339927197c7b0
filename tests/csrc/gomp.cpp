// OpenMP's parallel function for programs under the thread sanitizer, which does not see how libgomp's threads wait for
// each other: what happens before a region happens before each of its bodies, and these before what follows it.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

namespace {

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

struct Region {
    void (*body)(void *);
    void *context;
    char started, ended;  // their addresses are what the sanitizer is told of
};

void run(void *argument) {
    Region &region = *static_cast<Region *>(argument);
    __tsan_acquire(&region.started);
    region.body(region.context);
    __tsan_release(&region.ended);
}

}  // namespace

extern "C" void GOMP_parallel(void (*body)(void *), void *context, unsigned threads, unsigned flags) {
    static const Parallel original = reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"));
    Region region = {body, context, 0, 0};
    __tsan_release(&region.started);
    original(run, &region, threads, flags);
    __tsan_acquire(&region.ended);
}
