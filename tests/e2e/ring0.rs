//! For a machine whose `/dev/kvm` only interprets ring 0, or has none: no
//! sandbox can start, and that is what the user is told.

use anyhow::ensure;
use rvm_tests::{case, scale};

#[test]
fn ctr_is_told_that_kvm_cannot_run_a_kernel() {
    case(|world| {
        let finished = world.ctr().container("ring0").run(&["true"])?;
        println!("{finished}");
        ensure!(finished.code() != 0, "{finished}");
        ensure!(finished.errors().trim_end().lines().count() == 1, "one error: {finished}");
        ensure!(finished.errors().contains("/dev/kvm"), "{finished}");
        ensure!(finished.took < scale::seconds(5.0), "{finished}");
        Ok(())
    });
}
