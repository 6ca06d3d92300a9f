"""Features of a guest's kernel that docs/guest-kernel.md lists: name, and a script that succeeds with it.

A script runs in a privileged container, in a new network namespace, with the tools of
`programs.network_tools`.
"""

from __future__ import annotations

from collections.abc import Mapping

NAT = "-t nat -A POSTROUTING -s 10.9.0.0/24 -j MASQUERADE"
STATE = "-A INPUT -m conntrack --ctstate ESTABLISHED -m comment --comment x -m multiport -p tcp --dports 1,2"
OWNER = "-A OUTPUT -m owner --uid-owner 5 -m limit --limit 1/s -j LOG"
REDIRECT = "-t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 15001"


# The shell of the image would use its own commands of these names.
PRELUDE = """
set -e
ip() { /usr/sbin/ip "$@"; }
tc() { /usr/sbin/tc "$@"; }
mke2fs() { /usr/sbin/mke2fs "$@"; }
ip link set lo up
"""


def _iptables(program: str) -> str:
    rules = (NAT.replace("10.9.0.0/24", "fd00::/64") if "6" in program else NAT, STATE, OWNER, REDIRECT)
    return " && ".join(f"{program} {rule}" for rule in rules)


def _link(type: str, options: str = "") -> str:
    return f"ip link add test0 type {type} {options} && ip link del test0"


def _above(type: str, options: str = "") -> str:
    return f"ip link add below0 type dummy && ip link add link below0 name test0 type {type} {options}"


def _mountable(type: str, source: str = "/dev/loop7") -> str:
    """The kernel knows the type once it was asked to mount it, whatever becomes of the mount."""
    return f"mount -t {type} {source} /mnt 2>/dev/null || grep -qw {type} /proc/filesystems"


_NFT = """
nft -f - <<END
table inet test {
 set ports { type inet_service; elements = { 80, 443 } }
 chain nat { type nat hook postrouting priority 100; oifname "lo" masquerade; }
 chain in { type filter hook input priority 0; ct state new tcp dport @ports limit rate 5/second log reject; }
 chain out { type filter hook output priority 0; meta skuid 5 counter; fib daddr type local accept; }
 chain pre { type nat hook prerouting priority -100; tcp dport 80 redirect to :8080; }
}
END
"""
_XFRM = (
    "ip xfrm state add src 10.0.0.1 dst 10.0.0.2 proto esp spi 1 mode tunnel auth 'hmac(sha256)' 0x0102"
    " enc 'cbc(aes)' 0x00112233445566778899aabbccddeeff"
    " && ip xfrm policy add src 10.0.0.0/24 dst 10.1.0.0/24 dir out"
    " tmpl src 10.0.0.1 dst 10.0.0.2 proto esp mode tunnel"
)
_EXT4 = (
    "truncate -s 8M /disk && mke2fs -q -t ext4 /disk && mount -o loop /disk /mnt && echo x >/mnt/file"
    " && umount /mnt && mount -o loop,ro /disk /mnt && cat /mnt/file && umount /mnt"
)

FEATURES: Mapping[str, str] = {
    "iptables (legacy)": _iptables("iptables-legacy"),
    "ip6tables (legacy)": _iptables("ip6tables-legacy"),
    "iptables (nft)": _iptables("iptables"),
    "ip6tables (nft)": _iptables("ip6tables"),
    "nft": _NFT,
    "conntrack sysctls": "echo 7 >/proc/sys/net/netfilter/nf_conntrack_udp_timeout",
    "IPVS": "iptables-legacy -A INPUT -m ipvs --ipvs -j ACCEPT",
    "bridge": _link("bridge"),
    "veth": _link("veth", "peer name test1"),
    "dummy": _link("dummy"),
    "bonding": _link("bond"),
    "VRF": _link("vrf", "table 10"),
    "IFB": _link("ifb"),
    "VLAN (802.1Q)": _above("vlan", "id 5"),
    "macvlan": _above("macvlan", "mode bridge"),
    "ipvlan": _above("ipvlan", "mode l2"),
    "VXLAN": _link("vxlan", "id 5 dstport 4789 local 10.0.0.1"),
    "Geneve": _link("geneve", "id 5 remote 10.0.0.1"),
    "IPIP": _link("ipip", "local 10.0.0.1 remote 10.0.0.2"),
    "GRE": _link("gre", "local 10.0.0.1 remote 10.0.0.2"),
    "SIT": _link("sit", "local 10.0.0.1 remote 10.0.0.2"),
    "IPv6 tunnels": _link("ip6tnl", "local fd00::1 remote fd00::2"),
    "WireGuard": _link("wireguard"),
    "TUN and TAP": "ip tuntap add test0 mode tun && ip tuntap add test1 mode tap",
    "XFRM (IPsec, ESP)": _XFRM,
    "XFRM interfaces": _link("xfrm", "if_id 5"),
    "PF_KEY sockets": "family 15 3 2",
    "SCTP": "family 2 1 132 && family 10 5 132",
    "UDP-Lite": "family 2 2 136",
    "MPTCP": "family 2 1 262",
    "vsock sockets": "family 40 1 0",
    "AF_ALG (kernel cryptography)": "family 38 5 0",
    "TCP congestion control: BBR": "echo bbr >/proc/sys/net/ipv4/tcp_congestion_control",
    # allowed in the pod's own network namespace alone
    "TCP congestion control: DCTCP": "nsenter --net=/proc/1/ns/net sh -c"
    " 'cd /proc/sys/net/ipv4; echo dctcp >tcp_congestion_control; echo cubic >tcp_congestion_control'",
    "traffic control: HTB, TBF": "tc qdisc add dev lo root handle 1: htb && tc qdisc del dev lo root"
    " && tc qdisc add dev lo root tbf rate 1mbit burst 10k latency 10ms",
    "traffic control: netem": "tc qdisc add dev lo root netem delay 1ms",
    "traffic control: filters": "tc qdisc add dev lo clsact"
    " && tc filter add dev lo ingress protocol ip flower ip_proto tcp dst_port 80 action drop",
    "loop devices, ext4": _EXT4,
    "XFS": _mountable("xfs"),
    "Btrfs": _mountable("btrfs"),
    "SquashFS": _mountable("squashfs"),
    "EROFS": _mountable("erofs"),
    "ISO 9660": _mountable("iso9660"),
    "FAT": _mountable("vfat"),
    "NFS client": _mountable("nfs4", "127.0.0.1:/"),
    "SMB client": _mountable("cifs", "//127.0.0.1/x"),
    "overlayfs": "mkdir -p /dev/shm/o/u /dev/shm/o/w && mount -t overlay -o"
    " lowerdir=/bin,upperdir=/dev/shm/o/u,workdir=/dev/shm/o/w o /mnt && umount /mnt",
    "FUSE": "exec 3<>/dev/fuse",
    "device mapper": "exec 3<>/dev/mapper/control",
    "autofs": "exec 3<>/dev/autofs",
    "binfmt_misc": "mount -t binfmt_misc b /proc/sys/fs/binfmt_misc",
}
