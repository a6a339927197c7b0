// Preloaded into a process: logs the calls that change files below one folder, and lets one of them fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { ONCE, ON_A_FULL_DISK, KILL };

static char root[PATH_MAX], calls[1 << 20];
static size_t used;
static int count, failing, error, mode;

// Watch `folder`. The call number `at` (from 1; 0 for none) fails with `code`, and on a full disk all later ones that
// need space; or the process ends before it.
void faults_start(const char *folder, int at, int code, int how) {
    snprintf(root, sizeof root, "%s", folder);
    count = used = calls[0] = 0;
    failing = at, error = code, mode = how;
}

// The calls since `faults_start`, one a line, and the end of watching.
const char *faults_end(void) {
    root[0] = 0;
    return calls;
}

static int fails(const char *call, int folder, const char *name, int needs_space) {
    char path[2 * PATH_MAX], link[64];
    if (!root[0]) return 0;
    path[0] = 0;
    if (!name || name[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, path, PATH_MAX);
        path[length < 0 ? 0 : length] = 0;
        if (name) strcat(path, "/");
    }
    if (name) strncat(path, name, PATH_MAX - 1);
    if (strncmp(path, root, strlen(root)) || (path[strlen(root)] && path[strlen(root)] != '/')) return 0;
    if (used + strlen(path) + 32 < sizeof calls) used += sprintf(calls + used, "%s %s\n", call, path);
    count++;
    if (!failing || count < failing || (count > failing && !(mode == ON_A_FULL_DISK && needs_space))) return 0;
    if (mode == KILL) _exit(9);
    errno = error;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                                                         \
    int name(const char *path, int flags, ...) {                                                           \
        va_list rest;                                                                                      \
        va_start(rest, flags);                                                                             \
        int permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;                           \
        va_end(rest);                                                                                      \
        return fails("open", AT_FDCWD, path, flags & O_CREAT) ? -1 : REAL(name)(path, flags, permissions); \
    }
#define OPENAT(name)                                                                                             \
    int name(int folder, const char *path, int flags, ...) {                                                     \
        va_list rest;                                                                                            \
        va_start(rest, flags);                                                                                   \
        int permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;                                 \
        va_end(rest);                                                                                            \
        return fails("open", folder, path, flags & O_CREAT) ? -1 : REAL(name)(folder, path, flags, permissions); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define CALL(result, name, call, folder, path, needs_space, parameters, arguments) \
    result name parameters { return fails(call, folder, path, needs_space) ? -1 : REAL(name) arguments; }

CALL(ssize_t, write, "write", file, NULL, 1, (int file, const void *data, size_t size), (file, data, size))
CALL(int, ftruncate, "ftruncate", file, NULL, 1, (int file, off_t size), (file, size))
CALL(int, ftruncate64, "ftruncate", file, NULL, 1, (int file, off64_t size), (file, size))
CALL(int, fsync, "fsync", file, NULL, 1, (int file), (file))
CALL(int, fdatasync, "fsync", file, NULL, 1, (int file), (file))
CALL(int, mkdir, "mkdir", AT_FDCWD, path, 1, (const char *path, mode_t bits), (path, bits))
CALL(int, mkdirat, "mkdir", folder, path, 1, (int folder, const char *path, mode_t bits), (folder, path, bits))
CALL(int, link, "link", AT_FDCWD, to, 1, (const char *from, const char *to), (from, to))
CALL(int, linkat, "link", b, to, 1, (int a, const char *from, int b, const char *to, int flags),
     (a, from, b, to, flags))
CALL(int, rename, "rename", AT_FDCWD, to, 0, (const char *from, const char *to), (from, to))
CALL(int, renameat, "rename", b, to, 0, (int a, const char *from, int b, const char *to), (a, from, b, to))
CALL(int, renameat2, "swap", b, to, 0, (int a, const char *from, int b, const char *to, unsigned int flags),
     (a, from, b, to, flags))
CALL(int, unlink, "unlink", AT_FDCWD, path, 0, (const char *path), (path))
CALL(int, unlinkat, "unlink", folder, path, 0, (int folder, const char *path, int flags), (folder, path, flags))
CALL(int, rmdir, "unlink", AT_FDCWD, path, 0, (const char *path), (path))
CALL(int, chmod, "chmod", AT_FDCWD, path, 0, (const char *path, mode_t bits), (path, bits))
