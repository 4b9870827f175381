//! The benchmark's result for people.

use std::fmt::Write;

use serde_json::Value;

/// What must hold: path in the result, what it is, at most this much.
const AIMS: [(&str, &str, f64); 3] = [
    (
        "/ratios/rvm~1qemu-microvm, same kernel and initramfs",
        "(a) same kernel and initramfs, rvm/QEMU microvm",
        0.75,
    ),
    ("/ratios/rvm~1qemu-microvm, whole product", "(b) whole product, rvm/QEMU microvm", 0.50),
    ("/native/first_kvm_run_ms", "(c) exec to first KVM_RUN on this machine, ms", 10.0),
];
/// Shim and monitor together, in KiB, and what the guest has touched.
const HOST_KIB: f64 = 12.0 * 1024.0;
const GUEST_KIB: f64 = 40.0 * 1024.0;

/// The whole report.
pub fn text(result: &Value) -> String {
    let mut text = String::new();
    let conditions = &result["conditions"];
    let _ = writeln!(
        text,
        "{}\nMedians of {} runs in turn, {} vCPU, {} MiB, {}, host kernel {}.\n",
        string(&conditions["where"]),
        conditions["runs"],
        conditions["vcpus"],
        conditions["memory_mib"],
        string(&conditions["qemu"]),
        string(&conditions["host_kernel"])
    );
    for (path, name, aim) in AIMS {
        let value = result.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let _ = writeln!(text, "{} {name:<52} {value:>8.2}  (aim: at most {aim})", verdict(value <= aim));
    }
    let _ = writeln!(text);
    for (name, ms) in object(&result["medians_ms"]) {
        let _ = writeln!(text, "   {name:<32} {:>8.0} ms", number(ms));
    }
    exits(&mut text, &result["exits"]);
    memory(&mut text, &result["memory"]);
    parts(&mut text, "Where rvm's start goes (ms)", &result["steps_ms"]);
    parts(&mut text, "Exec to first KVM_RUN on this machine (ms)", &result["native"]["steps_ms"]);
    text
}

fn exits(text: &mut String, exits: &Value) {
    let _ = writeln!(text, "\nReturns to user space until ready, as KVM counts them:");
    for (name, counts) in object(exits) {
        let reasons = object(&counts["to_user_space"]);
        let total: u64 = reasons.iter().filter_map(|(_, count)| count.as_u64()).sum();
        let reasons: Vec<String> =
            reasons.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let all = &counts["kvm"]["exits"];
        let _ = writeln!(text, "   {name:<28} {total:>6}  ({}; of {all} exits in all)", reasons.join(", "));
    }
    let monitor: Vec<String> =
        object(&exits["rvm"]["monitor"]).iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    let _ = writeln!(text, "   rvm's by what the monitor did: {}", monitor.join(", "));
}

fn memory(text: &mut String, sizes: &Value) {
    let _ =
        writeln!(text, "\n(d) One idle sandbox, KiB (aims: shim + monitor {HOST_KIB}, guest {GUEST_KIB}):");
    for size in sizes.as_array().into_iter().flatten() {
        let (shim, monitor) = (number(&size["shim_pss_kib"]), number(&size["monitor_pss_kib"]));
        let touched = number(&size["guest_touched_kib"]);
        let _ = writeln!(
            text,
            "{} {} vCPUs {:>5} MiB: shim {shim:>6} + monitor {monitor:>6} = {:>6}, guest touched {touched:>6}",
            verdict(shim + monitor < HOST_KIB && touched < GUEST_KIB),
            size["vcpus"],
            size["memory_mib"],
            shim + monitor
        );
    }
}

/// The steps, and which three take longest: what is left to win.
fn parts(text: &mut String, title: &str, steps: &Value) {
    let mut last = 0.0;
    let mut taken = Vec::new();
    let _ = writeln!(text, "\n{title}:");
    for step in steps.as_array().into_iter().flatten() {
        let (name, at) = (string(&step[0]), number(&step[1]));
        let _ = writeln!(text, "   {name:<40} {:>9.2} {at:>9.2}", at - last);
        taken.push((at - last, name));
        last = at;
    }
    taken.sort_by(|a, b| b.0.total_cmp(&a.0));
    let largest: Vec<String> = taken.iter().take(3).map(|(ms, name)| format!("{name} {ms:.2}")).collect();
    let _ = writeln!(text, "   the three largest parts: {}", largest.join(", "));
}

fn verdict(holds: bool) -> &'static str {
    if holds { "ok    " } else { "MISSED" }
}

fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn object(value: &Value) -> Vec<(&String, &Value)> {
    value.as_object().map(|map| map.iter().collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_missed_aim_is_named() {
        let result = json!({
            "ratios": {
                "rvm/qemu-microvm, same kernel and initramfs": 0.8,
                "rvm/qemu-microvm, whole product": 0.4,
            },
            "native": { "first_kvm_run_ms": 3.0, "steps_ms": [["config", 1.0], ["kernel", 1.5], ["first KVM_RUN", 3.0]] },
        });
        let text = text(&result);
        assert!(text.lines().any(|line| line.starts_with("MISSED (a)")), "{text}");
        assert!(text.lines().any(|line| line.starts_with("ok     (b)")), "{text}");
        assert!(text.contains("largest parts: first KVM_RUN 1.50, config 1.00, kernel 0.50"), "{text}");
    }
}
