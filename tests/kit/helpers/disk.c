// disk synced FILE COUNT: write COUNT blocks of 4 KiB, each of which is on the disk before the next.
// disk write FILE MIB, disk read FILE MIB: from begin to end in blocks of 1 MiB; a write ends with fsync.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SMALL = 4 << 10, LARGE = 1 << 20 };

int main(int argc, char **argv) {
    static char block[LARGE];
    if (argc != 4)
        return 2;
    int reads = !strcmp(argv[1], "read"), synced = !strcmp(argv[1], "synced");
    int file = open(argv[2], reads ? O_RDONLY : O_WRONLY | O_CREAT | O_TRUNC | (synced ? O_DSYNC : 0), 0644);
    ssize_t size = synced ? SMALL : LARGE;
    memset(block, 'x', sizeof block);
    for (int left = file < 0 ? 0 : atoi(argv[3]); left > 0; left--)
        if ((reads ? read(file, block, (size_t)size) : write(file, block, (size_t)size)) != size)
            return 1;
    return file < 0 || (!reads && fsync(file) < 0);
}
