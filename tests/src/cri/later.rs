//! Fields of CRI's messages that the client's own do not have yet (`k8s.io/cri-api`, `api.proto`). What is said of a
//! message twice is one message, so they follow what the client wrote.

use k8s_cri::v1::{CreateContainerRequest, IdMapping, ImageSpec};
use prost::{
    DecodeError, Message,
    bytes::{Buf, BufMut},
    encoding::{DecodeContext, WireType},
};

/// More of a container's configuration.
#[derive(Clone, PartialEq, Message)]
pub struct More {
    /// Mounts beside the others.
    #[prost(message, repeated, tag = "7")]
    pub mounts: Vec<Mount>,
    /// Devices by the names that CDI's files give them.
    #[prost(message, repeated, tag = "17")]
    pub cdi_devices: Vec<CdiDevice>,
}

/// A mount.
#[derive(Clone, PartialEq, Message)]
pub struct Mount {
    /// Where it is in the container.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// What of the host it shows.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Not to be written to.
    #[prost(bool, tag = "3")]
    pub readonly: bool,
    /// How the owners of its files are mapped.
    #[prost(message, repeated, tag = "6")]
    pub uid_mappings: Vec<IdMapping>,
    /// Of groups.
    #[prost(message, repeated, tag = "7")]
    pub gid_mappings: Vec<IdMapping>,
    /// The image whose content it shows instead.
    #[prost(message, optional, tag = "9")]
    pub image: Option<ImageSpec>,
}

/// A device by its name.
#[derive(Clone, PartialEq, Message)]
pub struct CdiDevice {
    /// `VENDOR/CLASS=NAME`.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// The message's own part, with the field it is in.
#[derive(Clone, PartialEq, Message)]
struct Fragment {
    #[prost(message, optional, tag = "2")]
    config: Option<More>,
}

/// A request and what it says more.
#[derive(Clone, Debug, Default)]
pub(super) struct CreateContainer {
    request: CreateContainerRequest,
    fragment: Fragment,
}

impl CreateContainer {
    pub(super) fn new(request: CreateContainerRequest, more: More) -> Self {
        Self { request, fragment: Fragment { config: Some(more) } }
    }
}

impl Message for CreateContainer {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        self.request.encode_raw(buffer);
        self.fragment.encode_raw(buffer);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        self.request.merge_field(tag, wire_type, buffer, context)
    }

    fn encoded_len(&self) -> usize {
        self.request.encoded_len() + self.fragment.encoded_len()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use k8s_cri::v1::ContainerConfig;

    use super::*;

    #[test]
    fn what_is_said_more_is_of_the_same_message() {
        let config = ContainerConfig { log_path: "log".into(), ..Default::default() };
        let request = CreateContainerRequest { config: Some(config), ..Default::default() };
        let mount = Mount { container_path: "/v".into(), readonly: true, ..Default::default() };
        let more = More { mounts: vec![mount], ..Default::default() };
        let bytes = CreateContainer::new(request, more).encode_to_vec();
        let config = CreateContainerRequest::decode(&bytes[..]).unwrap().config.unwrap();
        assert_eq!((config.log_path.as_str(), config.mounts.len()), ("log", 1));
        assert_eq!(config.mounts[0].container_path, "/v");
    }
}
