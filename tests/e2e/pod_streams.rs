//! What kubelet and the API server ask of a running container as streams: commands with input and terminal, attached
//! programs, forwarded ports. Each under runc and under rvm.

use anyhow::Result;
use k8s_cri::v1::ContainerState;
use rvm_tests::cri::{
    Pod,
    stream::{Channels, RESIZE, STATUS, STDERR, STDIN, STDOUT},
};

use crate::pods::{plain, same};

/// Receives to the end; all that was said.
fn whole(mut channels: Channels) -> Result<[String; 3]> {
    channels.to_end()?;
    Ok([STDOUT, STDERR, STATUS].map(|channel| channels.text(channel)))
}

#[test]
fn commands_have_input_output_and_a_status() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "exec", plain)?;
        let one = pod.start("one", &["sleep", "100000"], |_| {})?;

        let script = "read a b; echo \"$b $a\"; echo no >&2; exit 7";
        let mut exec = one.exec_stream(&["sh", "-c", script], false)?;
        exec.send(STDIN, b"world ")?;
        exec.send(STDIN, b"hello\n")?;
        seen.add("both ways", whole(exec)?);
        seen.add("no input", whole(one.exec_stream(&["echo", "at once"], false)?)?);
        // Millions of bytes, all of them and in order.
        let [bytes, ..] = whole(one.exec_stream(&["seq", "200000"], false)?)?;
        seen.add("much output", (bytes.len(), bytes.lines().last().map(str::to_owned)));
        let missing = one.exec_stream(&["/nowhere"], false)?;
        let [_, _, status] = whole(missing)?;
        seen.add("no such program", (status.contains("Failure"), status.contains("/nowhere")));
        seen.add("killed", whole(one.exec_stream(&["sh", "-c", "kill -9 $$"], false)?)?);
        pod.remove()
    });
}

#[test]
fn a_terminal_follows_its_window() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "terminal", plain)?;
        let one = pod.start("one", &["sleep", "100000"], |_| {})?;
        let mut exec = one.exec_stream(&["sh"], true)?;
        let said = |exec: &mut Channels, command: &str, end: &str| -> Result<bool> {
            let before = exec.text(STDOUT).len();
            exec.send(STDIN, command.as_bytes())?;
            // And the prompt: what is typed before it is lost when the shell takes the terminal back.
            let prompted = |said: &str| said.split_once(end).is_some_and(|(_, rest)| rest.contains("# "));
            exec.until(end, |exec| prompted(&exec.text(STDOUT)[before..]))?;
            Ok(true)
        };
        exec.send(RESIZE, br#"{"Width":101,"Height":33}"#)?;
        // The window is told beside the input.
        let loops = "until [ \"$(stty size)\" = '33 101' ]; do sleep 0.05; done; echo si''zed\n";
        seen.add("size", said(&mut exec, loops, "sized")?);
        exec.send(RESIZE, br#"{"Width":80,"Height":24}"#)?;
        let loops = "until [ \"$(stty size)\" = '24 80' ]; do sleep 0.05; done; echo re''sized\n";
        seen.add("size again", said(&mut exec, loops, "resized")?);
        seen.add("is one", said(&mut exec, "test -t 0 && test -t 1 && echo te''rminal; tty\n", "terminal")?);
        // Control-C ends the program, not the shell.
        exec.send(
            STDIN,
            b"sh -c 'trap \"echo inter\"\"rupted; exit\" INT; echo rea\"\"dy; while :; do sleep 0.1; done'\n",
        )?;
        exec.until("the sleep", |exec| exec.text(STDOUT).contains("ready\r\n"))?;
        seen.add("interrupt", said(&mut exec, "\u{3}", "interrupted")?);
        exec.send(STDIN, b"exit 3\n")?;
        exec.to_end()?;
        seen.add("status", exec.text(STATUS));
        pod.remove()
    });
}

#[test]
fn a_running_program_is_attached_to() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "attach", plain)?;
        let script = "while read line; do echo \"got $line\"; echo \"err $line\" >&2; done; exit 4";
        let reads = pod.start("reads", &["sh", "-c", script], |config| config.stdin = true)?;
        let mut first = reads.attach(true, false)?;
        first.send(STDIN, b"one\n")?;
        first.until("an answer", |first| first.text(STDOUT).contains("got one"))?;
        // A second one sees what comes from then on, as the first does.
        let mut second = reads.attach(true, false)?;
        second.send(STDIN, b"two\n")?;
        for (name, attached) in [("first", &mut first), ("second", &mut second)] {
            attached
                .until("its line", |it| it.text(STDOUT).contains("two") && it.text(STDERR).contains("two"))?;
            seen.add(name, (attached.text(STDOUT), attached.text(STDERR).contains("err two")));
        }
        // One that goes takes nothing with it.
        drop(second);
        first.send(STDIN, b"three\n")?;
        first.until("the third", |first| first.text(STDOUT).contains("got three"))?;
        let log = reads.printed("got three")?;
        seen.add(
            "log",
            log.lines().filter(|line| line.contains("got")).map(str::to_owned).collect::<Vec<_>>(),
        );
        drop(first);

        let once =
            pod.start("once", &["sh", "-c", "read line; echo \"got $line\"; cat; exit 5"], |config| {
                (config.stdin, config.stdin_once) = (true, true);
            })?;
        let mut only = once.attach(true, false)?;
        only.send(STDIN, b"all\n")?;
        only.until("its line", |only| only.text(STDOUT).contains("got all"))?;
        drop(only);
        seen.add("input ends with its client", once.ended()?.exit_code);

        let shell = pod.start("shell", &["sh"], |config| (config.stdin, config.tty) = (true, true))?;
        let mut terminal = shell.attach(true, true)?;
        terminal.send(STDIN, b"echo $((6 * 7)); tty; exit 6\n")?;
        terminal.until("its answer", |terminal| terminal.text(STDOUT).contains("42"))?;
        seen.add("terminal", shell.ended()?.exit_code);
        pod.remove()
    });
}

#[test]
fn ports_of_the_loopback_are_forwarded() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "forward", plain)?;
        // One that hears on the loopback alone, and one on every address, which sends back what it is sent.
        let script = "mkdir /tmp/www; echo page > /tmp/www/page; httpd -f -p 127.0.0.1:8080 -h /tmp/www & \
                      nc -ll -p 8081 -e cat & \
                      until cat /proc/net/tcp* | grep -q ':1F90 .* 0A ' && cat /proc/net/tcp* | grep -q ':1F91 .* 0A '; \
                      do sleep 0.05; done; echo up; wait";
        let server = pod.start("server", &["sh", "-c", script], |_| {})?;
        server.printed("up")?;
        let mut forward = pod.forward(&[8080, 8081])?;
        forward.send(0, b"GET /page HTTP/1.0\r\n\r\n")?;
        forward.send(2, b"hello\n")?;
        forward.until("both", |both| both.text(0).contains("page\n") && both.text(2).contains("hello\n"))?;
        let page = forward.text(0);
        seen.add("a page", (page.contains("200 OK"), page.lines().last().map(str::to_owned)));
        seen.add("sent back", forward.text(2).chars().skip(2).collect::<String>());
        // It goes on being one connection, in which much can be under way both ways.
        let much = vec![b'm'; 60_000];
        for _ in 0..10 {
            forward.send(2, &much)?;
        }
        forward.until("all of it", |more| more.text(2).chars().count() >= 2 + 6 + 600_000)?;
        seen.add("much", forward.text(2).chars().count());
        drop(forward);
        for round in 0..3 {
            let mut forward = pod.forward(&[8081])?;
            forward.send(0, b"next\n")?;
            forward.until("an answer", |next| next.text(0).contains("next"))?;
            seen.add("once more", round);
        }
        let mut nobody = pod.forward(&[9])?;
        nobody.send(0, b"x")?;
        nobody.until("an error", |nobody| nobody.text(1).chars().count() > 2)?;
        // Refused under runc; accepted and reset under rvm (decision 0531).
        let told = nobody.text(1);
        seen.add("nobody there", told.contains(if cri.is_rvm() { "reset" } else { "refused" }));
        seen.add("nothing came", nobody.text(0).chars().count() == 2);
        seen.add("server", server.status()?.state() == ContainerState::ContainerRunning);
        pod.remove()
    });
}
