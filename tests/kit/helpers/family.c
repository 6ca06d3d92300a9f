// Makes a socket: family FAMILY TYPE PROTOCOL, as numbers. Prints "made", or why not.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

int main(int argc, char **argv) {
    int made = argc == 4 ? socket(atoi(argv[1]), atoi(argv[2]), atoi(argv[3])) : -1;
    puts(made >= 0 ? "made" : strerror(errno));
    return made < 0;
}
