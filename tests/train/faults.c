/* Makes system calls fail, for tests of checkpoints: loaded with LD_PRELOAD, armed by a call of fault_arm.
 *
 * Counted are the calls that change files below a folder: write, fsync, rename, mkdir, opening for writing, unlink.
 * The n-th of them, and all after it, fail with an error number; or the process is killed there; or a write is cut
 * short before the failure. Descriptors are told apart by their names in /proc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { KILL = -1, SHORT = -2 };

static char folder[4096];
static long at = -1;
static int what;
static long seen;

void fault_arm(const char *path, long n, int error) {
    snprintf(folder, sizeof folder, "%s", path);
    at = n, what = error, __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
}

long fault_count(void) { return __atomic_load_n(&seen, __ATOMIC_SEQ_CST); }

/* 0: go ahead; otherwise the error number, or SHORT. */
static int fault(const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder)) != 0) return 0;
    long now = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
    if (at < 0 || now < at) return 0;
    if (what == KILL) raise(SIGKILL);
    if (what == SHORT) return now == at ? SHORT : ENOSPC;
    return what;
}

static int fault_fd(int fd) {
    if (!folder[0]) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fault(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(error) do { errno = (error) == SHORT ? EIO : (error); return -1; } while (0)

ssize_t write(int fd, const void *data, size_t n) {
    int error = fault_fd(fd);
    if (error == SHORT) return n > 1 ? REAL(write)(fd, data, n / 2) : REAL(write)(fd, data, n);
    if (error) FAIL(error);
    return REAL(write)(fd, data, n);
}

int fsync(int fd) {
    int error = fault_fd(fd);
    if (error) FAIL(error);
    return REAL(fsync)(fd);
}

int rename(const char *from, const char *to) {
    int error = fault(to);
    if (error) FAIL(error);
    return REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    int error = fault(path);
    if (error) FAIL(error);
    return REAL(mkdir)(path, mode);
}

int unlink(const char *path) {
    int error = fault(path);
    if (error) FAIL(error);
    return REAL(unlink)(path);
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
    if ((flags & O_ACCMODE) != O_RDONLY) {
        int error = fault(path);
        if (error) FAIL(error);
    }
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, name);
    return real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened("open64", path, flags, mode);
}
