// map FILE sync|hold: stores into a shared mapping of the file's first page;
// then msync(2), or sleeps.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int count, char **arguments) {
    int file = count == 3 ? open(arguments[1], O_RDWR) : -1;
    char *page = file < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (page == MAP_FAILED) {
        perror("map");
        return 1;
    }
    memcpy(page, "stored", 6);
    if (!strcmp(arguments[2], "sync")) {
        int failed = msync(page, 4096, MS_SYNC);
        puts(failed ? "not synced" : "synced");
        return failed;
    }
    puts("stored");
    fflush(stdout);
    sleep(3600);
    return 0;
}
