// accesslist FILE USER BITS   lets this user do what BITS say (4 read, 2 write, 1 execute), and only the
// owner else accesslist FILE             takes the list away
//
// As setfacl(1): the attribute that it sets is that of include/uapi/linux/posix_acl_xattr.h.

#include <errno.h>
#include <linux/posix_acl.h>
#include <linux/posix_acl_xattr.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>

static const char NAME[] = "system.posix_acl_access";

int main(int argc, char **argv) {
    struct {
        struct posix_acl_xattr_header header;
        struct posix_acl_xattr_entry entries[5];
    } list = {
        .header.a_version = POSIX_ACL_XATTR_VERSION,
        .entries =
            {
                {ACL_USER_OBJ, 7, ACL_UNDEFINED_ID},
                {ACL_USER, argc == 4 ? atoi(argv[3]) : 0, argc == 4 ? (unsigned)atoi(argv[2]) : 0},
                {ACL_GROUP_OBJ, 0, ACL_UNDEFINED_ID},
                {ACL_MASK, 7, ACL_UNDEFINED_ID},
                {ACL_OTHER, 0, ACL_UNDEFINED_ID},
            },
    };
    int result;
    if (argc == 4)
        result = setxattr(argv[1], NAME, &list, sizeof list, 0);
    else if (argc == 2)
        result = removexattr(argv[1], NAME);
    else
        return fputs("usage: accesslist FILE [USER BITS]\n", stderr), 2;
    if (result < 0)
        printf("%s\n", strerror(errno));
    return result < 0;
}
