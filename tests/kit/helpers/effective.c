/* Prints its user and group ids. Installed set-user-ID root, it shows whether privileges can be gained. */
#include <stdio.h>
#include <unistd.h>

int main(void) {
    printf("uid=%d euid=%d gid=%d egid=%d\n", (int)getuid(), (int)geteuid(), (int)getgid(), (int)getegid());
    return 0;
}
