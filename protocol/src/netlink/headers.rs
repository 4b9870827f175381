//! Numbers of attributes and flags, a module for each of the kernel's headers.
#![allow(missing_docs, reason = "they are documented there")]

/// Addresses: `linux/if_addr.h`.
pub mod if_addr {
    pub const IFA_ADDRESS: u16 = 1;
    pub const IFA_LOCAL: u16 = 2;
    pub const IFA_LABEL: u16 = 3;
    pub const IFA_BROADCAST: u16 = 4;
    pub const IFA_CACHEINFO: u16 = 6;
    pub const IFA_FLAGS: u16 = 8;
    pub const IFA_RT_PRIORITY: u16 = 9;
    pub const IFA_PROTO: u16 = 11;
}

/// Interfaces: `linux/if_link.h`.
pub mod if_link {
    pub const IFLA_ADDRESS: u16 = 1;
    pub const IFLA_IFNAME: u16 = 3;
    pub const IFLA_MTU: u16 = 4;
    pub const IFLA_LINK: u16 = 5;
    pub const IFLA_MASTER: u16 = 10;
    pub const IFLA_TXQLEN: u16 = 13;
    pub const IFLA_LINKINFO: u16 = 18;
    pub const IFLA_IFALIAS: u16 = 20;
    pub const IFLA_AF_SPEC: u16 = 26;
    pub const IFLA_GROUP: u16 = 27;
    pub const IFLA_NET_NS_FD: u16 = 28;
    pub const IFLA_LINK_NETNSID: u16 = 37;
    pub const IFLA_NEW_IFINDEX: u16 = 49;
    pub const IFLA_PARENT_DEV_NAME: u16 = 56;
    /// In [`IFLA_LINKINFO`].
    pub const IFLA_INFO_KIND: u16 = 1;
    /// In [`IFLA_AF_SPEC`], in what is of IPv6.
    pub const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
}

/// Neighbours: `linux/neighbour.h`.
pub mod neighbour {
    pub const NDA_DST: u16 = 1;
    pub const NDA_LLADDR: u16 = 2;
    pub const NUD_PERMANENT: u16 = 0x80;
    pub const NTF_PROXY: u8 = 0x08;
    pub const NTF_ROUTER: u8 = 0x80;
}

/// Routes: `linux/rtnetlink.h`.
pub mod rtnetlink {
    pub const RTA_DST: u16 = 1;
    pub const RTA_SRC: u16 = 2;
    pub const RTA_OIF: u16 = 4;
    pub const RTA_GATEWAY: u16 = 5;
    pub const RTA_PRIORITY: u16 = 6;
    pub const RTA_PREFSRC: u16 = 7;
    pub const RTA_METRICS: u16 = 8;
    pub const RTA_MULTIPATH: u16 = 9;
    pub const RTA_TABLE: u16 = 15;
    pub const RTA_VIA: u16 = 18;
    pub const RTA_PREF: u16 = 20;
    pub const RTA_ENCAP_TYPE: u16 = 21;
    /// In [`RTA_METRICS`]: the one that is a name.
    pub const RTAX_CC_ALGO: u16 = 16;
    pub const RTM_F_CLONED: u32 = 0x200;
    pub const RTNH_F_ONLINK: u8 = 4;
}

/// Routing policy rules: `linux/fib_rules.h`.
pub mod fib_rules {
    pub const FRA_DST: u16 = 1;
    pub const FRA_SRC: u16 = 2;
    pub const FRA_IIFNAME: u16 = 3;
    pub const FRA_GOTO: u16 = 4;
    pub const FRA_PRIORITY: u16 = 6;
    pub const FRA_FWMARK: u16 = 10;
    pub const FRA_TUN_ID: u16 = 12;
    pub const FRA_SUPPRESS_IFGROUP: u16 = 13;
    pub const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
    pub const FRA_TABLE: u16 = 15;
    pub const FRA_FWMASK: u16 = 16;
    pub const FRA_OIFNAME: u16 = 17;
    pub const FRA_L3MDEV: u16 = 19;
    pub const FRA_UID_RANGE: u16 = 20;
    pub const FRA_PROTOCOL: u16 = 21;
    pub const FRA_IP_PROTO: u16 = 22;
    pub const FRA_SPORT_RANGE: u16 = 23;
    pub const FRA_DPORT_RANGE: u16 = 24;
    pub const FR_ACT_TO_TBL: u32 = 1;
    pub const FIB_RULE_INVERT: u32 = 2;
}
