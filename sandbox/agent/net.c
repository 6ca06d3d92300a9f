#include "net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "scope.h"

enum { MAC_SIZE = 6, APPEAR_MS = 5000, APPEAR_STEP_MS = 5 };

// A request, followed by its attributes.
struct request {
    struct nlmsghdr header;
    char body[512];
};

struct prefix {
    int family;
    unsigned length;
    size_t size;
    uint8_t bytes[16];
};

static void *begin(struct request *request, uint16_t type, uint16_t flags, size_t body) {
    memset(request, 0, sizeof *request);
    request->header = (struct nlmsghdr){
        .nlmsg_len = (uint32_t)NLMSG_LENGTH(body),
        .nlmsg_type = type,
        .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags),
    };
    return request->body;
}

static struct rtattr *add(struct request *request, uint16_t type, const void *data, size_t size) {
    size_t at = NLMSG_ALIGN(request->header.nlmsg_len);
    struct rtattr *attribute = (struct rtattr *)((char *)request + at);
    attribute->rta_type = type;
    attribute->rta_len = (uint16_t)RTA_LENGTH(size);
    if (size)
        memcpy(RTA_DATA(attribute), data, size);
    request->header.nlmsg_len = (uint32_t)(at + RTA_ALIGN(attribute->rta_len));
    return attribute;
}

// Sends a request and waits for the kernel's acknowledgement: 0, or -1 with errno set.
static int transact(int socket, struct request *request) {
    char answer[8192];
    if (send(socket, request, request->header.nlmsg_len, 0) < 0)
        return -1;
    ssize_t size = recv(socket, answer, sizeof answer, 0);
    const struct nlmsghdr *header = (const struct nlmsghdr *)answer;
    if (size < (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr)) || header->nlmsg_type != NLMSG_ERROR) {
        errno = EBADMSG;
        return -1;
    }
    const struct nlmsgerr *reply = NLMSG_DATA(header);
    errno = -reply->error;
    return reply->error ? -1 : 0;
}

static bool parse_prefix(const char *text, struct prefix *prefix) {
    char address[64];
    unsigned length;
    if (sscanf(text, "%63[^/]/%u", address, &length) != 2)
        return false;
    prefix->family = strchr(address, ':') ? AF_INET6 : AF_INET;
    prefix->size = prefix->family == AF_INET6 ? 16 : 4;
    prefix->length = length;
    return length <= prefix->size * 8 && inet_pton(prefix->family, address, prefix->bytes) == 1;
}

// As NLMSG_OK, which compares signed with unsigned.
static bool is_whole(const struct nlmsghdr *header, int left) {
    return left >= (int)sizeof *header && header->nlmsg_len >= sizeof *header &&
           header->nlmsg_len <= (unsigned)left;
}

// Returns the index of the interface with this MAC, from one dump of all links; 0: there is none.
static unsigned find_by_mac(int socket, const uint8_t mac[MAC_SIZE]) {
    struct request request;
    char answer[32768];
    unsigned found = 0;
    struct ifinfomsg *link = begin(&request, RTM_GETLINK, NLM_F_DUMP, sizeof *link);
    request.header.nlmsg_flags &= (uint16_t)~NLM_F_ACK;
    if (send(socket, &request, request.header.nlmsg_len, 0) < 0)
        return 0;
    for (;;) {
        ssize_t size = recv(socket, answer, sizeof answer, 0);
        if (size <= 0)
            return 0;
        int left = (int)size;
        for (struct nlmsghdr *header = (struct nlmsghdr *)answer; is_whole(header, left);
             header = NLMSG_NEXT(header, left)) {
            if (header->nlmsg_type == NLMSG_DONE || header->nlmsg_type == NLMSG_ERROR)
                return found;
            struct ifinfomsg *info = NLMSG_DATA(header);
            int attributes = (int)IFLA_PAYLOAD(header);
            for (struct rtattr *a = IFLA_RTA(info); RTA_OK(a, attributes); a = RTA_NEXT(a, attributes))
                if (a->rta_type == IFLA_ADDRESS && RTA_PAYLOAD(a) == MAC_SIZE &&
                    !memcmp(RTA_DATA(a), mac, MAC_SIZE))
                    found = (unsigned)info->ifi_index;
        }
    }
}

// Same, but waits for a hot-plugged device to appear.
static unsigned await_by_mac(int socket, const uint8_t mac[MAC_SIZE]) {
    for (int waited = 0; waited < APPEAR_MS; waited += APPEAR_STEP_MS) {
        unsigned index = find_by_mac(socket, mac);
        if (index)
            return index;
        nanosleep(&(struct timespec){.tv_nsec = APPEAR_STEP_MS * 1000000L}, NULL);
    }
    return 0;
}

static int rename_link(int socket, unsigned index, const char *name) {
    struct request request;
    struct ifinfomsg *link = begin(&request, RTM_NEWLINK, 0, sizeof *link);
    link->ifi_index = (int)index;
    add(&request, IFLA_IFNAME, name, strlen(name) + 1);
    return transact(socket, &request);
}

static int set_mac(int socket, unsigned index, const uint8_t mac[MAC_SIZE]) {
    struct request request;
    struct ifinfomsg *link = begin(&request, RTM_NEWLINK, 0, sizeof *link);
    link->ifi_index = (int)index;
    add(&request, IFLA_ADDRESS, mac, MAC_SIZE);
    return transact(socket, &request);
}

static int bring_up(int socket, unsigned index, uint32_t mtu) {
    struct request request;
    struct ifinfomsg *link = begin(&request, RTM_NEWLINK, 0, sizeof *link);
    link->ifi_index = (int)index;
    link->ifi_flags = link->ifi_change = IFF_UP;
    if (mtu)
        add(&request, IFLA_MTU, &mtu, sizeof mtu);
    return transact(socket, &request);
}

static int shut_down(int socket, unsigned index) {
    struct request request;
    struct ifinfomsg *link = begin(&request, RTM_NEWLINK, 0, sizeof *link);
    link->ifi_index = (int)index;
    link->ifi_change = IFF_UP;
    return transact(socket, &request);
}

static int change_address(int socket, uint16_t type, uint16_t flags, unsigned index,
                          const struct prefix *prefix) {
    struct request request;
    struct ifaddrmsg *address = begin(&request, type, flags, sizeof *address);
    *address = (struct ifaddrmsg){
        .ifa_family = (uint8_t)prefix->family,
        .ifa_prefixlen = (uint8_t)prefix->length,
        .ifa_flags =
            prefix->family == AF_INET6 ? IFA_F_NODAD : 0, // the CNI plug-in has checked for duplicates
        .ifa_index = index,
    };
    add(&request, IFA_LOCAL, prefix->bytes, prefix->size);
    add(&request, IFA_ADDRESS, prefix->bytes, prefix->size);
    return transact(socket, &request);
}

// Otherwise a link-local address would be unusable for the second that duplicate address detection takes.
static void disable_duplicate_detection(const char *name) {
    char path[128];
    snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/accept_dad", name);
    autoclose int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file >= 0 && write(file, "0", 1) < 0)
        console_log("%s: %s", path, strerror(errno));
}

static int add_address(int socket, unsigned index, const struct prefix *prefix) {
    return change_address(socket, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, prefix);
}

static int configure_interface(int socket, const Interface *interface, unsigned index, struct error *error) {
    char name[IF_NAMESIZE];
    if (strcmp(if_indextoname(index, name) ? name : "", interface->name) &&
        rename_link(socket, index, interface->name) < 0)
        return fail(error, errno, "rename to %s", interface->name);
    disable_duplicate_detection(interface->name);
    for (size_t i = 0; i < interface->n_addresses; i++) {
        struct prefix prefix;
        if (!parse_prefix(interface->addresses[i], &prefix))
            return fail(error, EINVAL, "address %s", interface->addresses[i]);
        if (add_address(socket, index, &prefix) < 0 && errno != EEXIST)
            return fail(error, errno, "address %s", interface->addresses[i]);
    }
    if (bring_up(socket, index, interface->mtu) < 0)
        return fail(error, errno, "bring up %s", interface->name);
    return 0;
}

static bool parse_mac(const char *text, uint8_t mac[MAC_SIZE]) {
    return sscanf(text, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4],
                  &mac[5]) == MAC_SIZE;
}

// Finds the NIC of an interface and sets its MAC; returns its index, or 0 after a failure.
static unsigned find_interface(int socket, const Interface *interface, struct error *error) {
    uint8_t mac[MAC_SIZE], found[MAC_SIZE];
    const char *present = *interface->found_mac ? interface->found_mac : interface->mac;
    if (!parse_mac(interface->mac, mac) || !parse_mac(present, found)) {
        fail(error, EINVAL, "interface %s", interface->mac);
        return 0;
    }
    unsigned index = await_by_mac(socket, found);
    if (!index)
        fail(error, ENODEV, "interface %s", present);
    else if (memcmp(mac, found, MAC_SIZE) && set_mac(socket, index, mac) < 0) {
        fail(error, errno, "address %s of interface %s", interface->mac, present);
        return 0;
    }
    return index;
}

// Finds each NIC, and gives a temporary name to those that will be renamed: two may swap their names.
static int find_interfaces(int socket, Interface **interfaces, size_t count, unsigned *indices,
                           struct error *error) {
    for (size_t i = 0; i < count; i++) {
        char name[IF_NAMESIZE], spare[IF_NAMESIZE];
        indices[i] = find_interface(socket, interfaces[i], error);
        if (!indices[i])
            return -1;
        if (count == 1 || (if_indextoname(indices[i], name) && !strcmp(name, interfaces[i]->name)))
            continue;
        snprintf(spare, sizeof spare, "husk%zu", i);
        if (rename_link(socket, indices[i], spare) < 0)
            return fail(error, errno, "rename to %s", spare);
    }
    return 0;
}

static int add_route(int socket, const Route *route, struct error *error) {
    struct prefix destination, gateway;
    char gateway_text[80];
    struct request request;
    unsigned index = if_nametoindex(route->interface);
    if (!parse_prefix(route->destination, &destination) || !index)
        return fail(error, EINVAL, "route %s", route->destination);
    struct rtmsg *message = begin(&request, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof *message);
    *message = (struct rtmsg){
        .rtm_family = (uint8_t)destination.family,
        .rtm_dst_len = (uint8_t)destination.length,
        .rtm_table = RT_TABLE_MAIN,
        .rtm_protocol = RTPROT_STATIC,
        .rtm_scope = *route->gateway ? RT_SCOPE_UNIVERSE : RT_SCOPE_LINK,
        .rtm_type = RTN_UNICAST,
        .rtm_flags = route->on_link ? RTNH_F_ONLINK : 0,
    };
    add(&request, RTA_DST, destination.bytes, destination.size);
    add(&request, RTA_OIF, &index, sizeof index);
    if (*route->gateway) {
        snprintf(gateway_text, sizeof gateway_text, "%.63s/0", route->gateway);
        if (!parse_prefix(gateway_text, &gateway) || gateway.family != destination.family)
            return fail(error, EINVAL, "route %s", route->destination);
        add(&request, RTA_GATEWAY, gateway.bytes, gateway.size);
    }
    if (route->metric)
        add(&request, RTA_PRIORITY, &route->metric, sizeof route->metric);
    if (route->mtu) {
        struct {
            struct rtattr header;
            uint32_t mtu;
        } metrics = {{.rta_len = RTA_LENGTH(sizeof(uint32_t)), .rta_type = RTAX_MTU}, route->mtu};
        add(&request, RTA_METRICS, &metrics, sizeof metrics);
    }
    if (transact(socket, &request) < 0 && errno != EEXIST)
        return fail(error, errno, "route %s", route->destination);
    return 0;
}

int net_configure(Interface **interfaces, size_t interface_count, Route **routes, size_t route_count,
                  struct error *error) {
    unsigned indices[64];
    autoclose int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (netlink < 0)
        return fail(error, errno, "netlink");
    if (interface_count > sizeof indices / sizeof indices[0])
        return fail(error, E2BIG, "interfaces");
    if (bring_up(netlink, if_nametoindex("lo"), 0) < 0)
        return fail(error, errno, "bring up lo");
    if (find_interfaces(netlink, interfaces, interface_count, indices, error) < 0)
        return -1;
    for (size_t i = 0; i < interface_count; i++)
        if (configure_interface(netlink, interfaces[i], indices[i], error) < 0)
            return -1;
    for (size_t i = 0; i < route_count; i++)
        if (add_route(netlink, routes[i], error) < 0)
            return -1;
    return 0;
}

// Shutting an interface down removes its routes and its IPv6 addresses too.
static int deconfigure_interface(int socket, const Interface *interface, struct error *error) {
    uint8_t mac[MAC_SIZE];
    unsigned index = if_nametoindex(interface->name);
    if (!index || shut_down(socket, index) < 0)
        return fail(error, errno, "shut down %s", interface->name);
    for (size_t i = 0; i < interface->n_addresses; i++) {
        struct prefix prefix;
        if (parse_prefix(interface->addresses[i], &prefix) && prefix.family == AF_INET &&
            change_address(socket, RTM_DELADDR, 0, index, &prefix) < 0)
            return fail(error, errno, "remove address %s", interface->addresses[i]);
    }
    if (parse_mac(interface->found_mac, mac) && set_mac(socket, index, mac) < 0)
        return fail(error, errno, "address %s", interface->found_mac);
    return 0;
}

int net_deconfigure(Interface **interfaces, size_t count, struct error *error) {
    autoclose int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (netlink < 0)
        return fail(error, errno, "netlink");
    for (size_t i = 0; i < count; i++)
        if (deconfigure_interface(netlink, interfaces[i], error) < 0)
            return -1;
    return 0;
}
