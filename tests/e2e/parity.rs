//! What a container sees is what it would see under runc.

use anyhow::ensure;
use rvm_tests::{case, parity};

#[test]
fn same_as_runc() {
    case(|world| {
        let report = parity::run(world)?;
        println!("{}", report.summary());
        let wrong = parity::wrong(&report);
        ensure!(wrong.is_empty(), "{report}\n{}", wrong.join("\n"));
        Ok(())
    });
}
