#include "pty.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <unistd.h>

#include "scope.h"
#include "userspace.h"

enum { TTYAUX_MAJOR = 5, PTMX_MINOR = 2 };

int pty_open(int root, const Process *process, int *slave, struct error *error) {
    // the container may have put anything there: opening must not block, and the type is checked
    struct open_how how = {
        .flags = O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC,
        .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
    };
    struct stat status;
    autoclose int master = (int)syscall(SYS_openat2, root, "/dev/pts/ptmx", &how, sizeof how);
    if (master < 0 || fstat(master, &status) < 0)
        return fail(error, errno, "open /dev/pts/ptmx");
    if (!S_ISCHR(status.st_mode) || status.st_rdev != makedev(TTYAUX_MAJOR, PTMX_MINOR))
        return fail(error, ENOTTY, "open /dev/pts/ptmx");
    int unlocked = 0;
    struct winsize size = {
        .ws_row = (unsigned short)(process->rows ? process->rows : 24),
        .ws_col = (unsigned short)(process->columns ? process->columns : 80),
    };
    if (ioctl(master, TIOCSPTLCK, &unlocked) < 0)
        return fail(error, errno, "terminal");
    autoclose int peer = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (peer < 0 || ioctl(peer, TIOCSWINSZ, &size) < 0 ||
        fchown(peer, userspace_uid(process, process->uid), (gid_t)-1) < 0)
        return fail(error, errno, "terminal");
    *slave = take_fd(&peer);
    return take_fd(&master);
}

int pty_resize(int master, uint32_t rows, uint32_t columns, struct error *error) {
    if (rows > UINT16_MAX || columns > UINT16_MAX)
        return fail_about(error, EINVAL, "resize", "rows or columns");
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    return ioctl(master, TIOCSWINSZ, &size) < 0 ? fail(error, errno, "resize") : 0;
}
