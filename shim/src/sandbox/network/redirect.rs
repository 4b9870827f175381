//! tc(8) as far as it is used here: everything that arrives on one interface
//! leaves by another, before the namespace's own network stack sees it.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use rvm_protocol::netlink::{
    Attributes, NLM_F_CREATE, NLM_F_EXCL, Refusal, Socket, attributes, if_link::IFLA_IFNAME, text, u32_at,
};

// linux/rtnetlink.h
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
// linux/pkt_sched.h: the qdisc `clsact`, and what arrives in it.
const TC_H_CLSACT: u32 = 0xffff_fff1;
const HANDLE_CLSACT: u32 = 0xffff_0000;
const PARENT_INGRESS: u32 = 0xffff_fff2;
// linux/pkt_cls.h
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TC_U32_TERMINAL: u8 = 1;
const TC_ACT_STOLEN: u32 = 4;
// linux/tc_act/tc_mirred.h
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const ETH_P_ALL: u16 = 3;

/// Priorities of our filters, by which they are known; others' may come before. That
/// of the redirection,
const PRIORITY: u16 = 0x7276;
/// and that of what is not to be redirected.
const PRIORITY_EXCEPT: u16 = 0x7275;

/// A redirection, for [`Redirect::remove`].
#[derive(Debug)]
pub struct Redirect {
    from: u32,
    /// Whether the qdisc is ours too.
    qdisc: bool,
}

impl Redirect {
    /// Has what arrives on the interface `from` leave by `to`.
    pub fn create(socket: &Socket, from: u32, to: u32) -> Result<Self, Refusal> {
        let mut clsact = Attributes::default();
        clsact.text(TCA_KIND, "clsact");
        let header = tcmsg(from, HANDLE_CLSACT, TC_H_CLSACT, 0);
        let qdisc = match socket.request(libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &header, &clsact) {
            Ok(()) => true,
            // Somebody else's, or what a shim that was killed has left.
            Err(refusal) if refusal.errno == Errno::EEXIST => {
                clear(socket, from)?;
                false
            }
            Err(refusal) => return Err(refusal),
        };
        let redirect = Self { from, qdisc };
        match socket.request(
            libc::RTM_NEWTFILTER,
            NLM_F_CREATE | NLM_F_EXCL,
            &tcmsg(from, 0, PARENT_INGRESS, filter_info(PRIORITY)),
            &everything_to(to),
        ) {
            Ok(()) => Ok(redirect),
            Err(refusal) => {
                redirect.remove(socket);
                Err(refusal)
            }
        }
    }

    /// Has a program (`BPF_PROG_TYPE_SCHED_CLS`) see what arrives first and say what is
    /// not to be redirected.
    pub fn except(&self, socket: &Socket, program: BorrowedFd<'_>) -> Result<(), Refusal> {
        let (mut filter, mut bpf) = (Attributes::default(), Attributes::default());
        bpf.u32(TCA_BPF_FD, program.as_raw_fd().cast_unsigned());
        bpf.text(TCA_BPF_NAME, "rvm");
        bpf.u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
        filter.text(TCA_KIND, "bpf");
        filter.nested(TCA_OPTIONS, &bpf);
        let header = tcmsg(self.from, 0, PARENT_INGRESS, filter_info(PRIORITY_EXCEPT));
        socket.request(libc::RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &header, &filter)
    }

    /// Takes it off again; it is fine that the interface has gone.
    pub fn remove(&self, socket: &Socket) {
        let removed = match self.qdisc {
            true => socket.request(
                libc::RTM_DELQDISC,
                0,
                &tcmsg(self.from, HANDLE_CLSACT, TC_H_CLSACT, 0),
                &Attributes::default(),
            ),
            false => clear(socket, self.from),
        };
        match removed {
            Ok(()) => {}
            Err(Refusal { errno: Errno::ENODEV | Errno::ENOENT | Errno::EINVAL, .. }) => {}
            Err(refusal) => log::warn!("interface {}: its filter stays: {refusal}", self.from),
        }
    }
}

/// Takes our filters off an interface.
fn clear(socket: &Socket, from: u32) -> Result<(), Refusal> {
    [PRIORITY_EXCEPT, PRIORITY].into_iter().try_for_each(|priority| {
        let header = tcmsg(from, 0, PARENT_INGRESS, filter_info(priority));
        match socket.request(libc::RTM_DELTFILTER, 0, &header, &Attributes::default()) {
            Err(refusal) if refusal.errno == Errno::ENOENT => Ok(()),
            result => result,
        }
    })
}

/// Takes off what a shim that was killed has left on an interface: the filter,
/// and the qdisc unless somebody else has filters there.
pub fn clean_up(socket: &Socket, from: u32) -> Result<(), Refusal> {
    let is_our_priority = |info: u32| [PRIORITY, PRIORITY_EXCEPT].map(u32::from).contains(&(info >> 16));
    let ours = |filter: &Vec<u8>| u32_at(filter, 16).is_some_and(is_our_priority);
    let filters = match socket.dump(libc::RTM_GETTFILTER, &tcmsg(from, 0, PARENT_INGRESS, 0)) {
        Ok(filters) => filters,
        // It has no such qdisc.
        Err(Refusal { errno: Errno::EINVAL | Errno::ENOENT | Errno::EOPNOTSUPP, .. }) => return Ok(()),
        Err(refusal) => return Err(refusal),
    };
    if filters.iter().any(ours) {
        Redirect { from, qdisc: filters.iter().all(ours) }.remove(socket);
    }
    Ok(())
}

/// The number of the interface `name`.
pub fn index_of(socket: &Socket, name: &str) -> Result<u32, Refusal> {
    let links = socket.dump(libc::RTM_GETLINK, &[0; 16])?;
    let named = |link: &&Vec<u8>| {
        let rest = link.get(16..).unwrap_or_default();
        attributes(rest).any(|(kind, value)| kind == IFLA_IFNAME && text(value) == name)
    };
    links.iter().find(named).and_then(|link| u32_at(link, 4)).ok_or_else(|| Errno::ENODEV.into())
}

/// `struct tcmsg`.
fn tcmsg(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut message = [0; 20];
    for (n, value) in [0, index, handle, parent, info].into_iter().enumerate() {
        message[n * 4..][..4].copy_from_slice(&value.to_ne_bytes());
    }
    message
}

/// Priority and protocol.
fn filter_info(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from(ETH_P_ALL.to_be())
}

/// A u32 filter, which every kernel with tc has, that takes all.
fn everything_to(to: u32) -> Attributes {
    // struct tc_u32_sel with one key whose mask is empty.
    let mut selector = [0; 32];
    (selector[0], selector[2]) = (TC_U32_TERMINAL, 1);
    // struct tc_mirred: index, capabilities, action, two counts, what to do, where to.
    let parameters = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to].map(u32::to_ne_bytes).concat();
    let (mut options, mut action, mut actions) =
        (Attributes::default(), Attributes::default(), Attributes::default());
    options.bytes(TCA_MIRRED_PARMS, &parameters);
    action.text(TCA_ACT_KIND, "mirred");
    action.nested(TCA_ACT_OPTIONS, &options);
    actions.nested(1, &action);
    let (mut filter, mut u32) = (Attributes::default(), Attributes::default());
    u32.bytes(TCA_U32_SEL, &selector);
    u32.nested(TCA_U32_ACT, &actions);
    filter.text(TCA_KIND, "u32");
    filter.nested(TCA_OPTIONS, &u32);
    filter
}
