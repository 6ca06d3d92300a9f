// Sets or removes an extended attribute of a file: attribute FILE NAME [VALUE]. Says why it failed.
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>

int main(int argc, char **argv) {
    if (argc < 3)
        return 2;
    int failed =
        argc > 3 ? setxattr(argv[1], argv[2], argv[3], strlen(argv[3]), 0) : removexattr(argv[1], argv[2]);
    if (failed)
        perror(argv[2]);
    return failed != 0;
}
