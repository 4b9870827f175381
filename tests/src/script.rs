//! Shell for containers, where several cases need the same.

/// Defines `clock`, which sets `t` to the hundredths of a second since the guest's boot, by the
/// shell alone: a program started to read the time takes some of what it measures.
///
/// 0.92 s are 92, not `092`, which the shell takes for octal.
pub const CLOCK: &str =
    "clock() { read -r t rest < ${UPTIME:-/proc/uptime}; t=${t%.*}${t#*.}; t=${t#0}; t=${t#0}; };";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::shell;

    #[test]
    fn the_first_second_is_decimal() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("uptime");
        for (uptime, expected) in [("0.00", 1), ("0.09", 10), ("0.92", 93), ("1.07", 108), ("120.50", 12051)]
        {
            std::fs::write(&file, format!("{uptime} 0.10\n"))?;
            let text = shell(&format!("UPTIME={}; {CLOCK} clock; echo $((t + 1))", file.display()))?;
            assert_eq!(text, format!("{expected}\n"), "{uptime}");
        }
        Ok(())
    }
}
