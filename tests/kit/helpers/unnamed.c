// unnamed DIRECTORY: makes a file without a name there (O_TMPFILE), writes to it and gives it the name
// "named". Prints "made", or the reason why it cannot.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
    char path[64];
    int fd = argc == 2 && chdir(argv[1]) == 0 ? open(".", O_TMPFILE | O_RDWR, 0600) : -1;
    if (fd < 0 || write(fd, "text", 4) != 4) {
        puts(strerror(errno));
        return 1;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW) < 0) {
        puts(strerror(errno));
        return 1;
    }
    puts("made");
    return 0;
}
