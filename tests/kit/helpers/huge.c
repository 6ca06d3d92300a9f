// huge FILE MIB: maps MIB mebibytes of FILE (created if missing) on a hugetlbfs, or anonymous huge pages
// where FILE is "-", writes to every page, and prints the first byte as it was before.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    size_t size = strtoul(argv[2], NULL, 10) << 20;
    int anonymous = !strcmp(argv[1], "-");
    int file = anonymous ? -1 : open(argv[1], O_RDWR | O_CREAT, 0600);
    if (!anonymous && file < 0) {
        printf("open: %s\n", strerror(errno));
        return 1;
    }
    int flags = anonymous ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB : MAP_SHARED;
    char *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, 0);
    if (bytes == MAP_FAILED) {
        printf("mmap: %s\n", strerror(errno));
        return 1;
    }
    printf("was %d\n", bytes[0]);
    for (size_t at = 0; at < size; at += 4096)
        bytes[at] = 42;
    return 0;
}
