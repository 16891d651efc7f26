// lifeline: loaded first into the command that bootstrap.mjs starts. When the launcher is gone without a word (kill -9), the command is told
// to end as by `kill`, and ends in its own order. Processes that the command starts itself are not concerned.
if (process.env.TROUPE_LAUNCHER_PID === String(process.ppid) && process.channel !== undefined) {
  process.once("disconnect", () => process.kill(process.pid, "SIGTERM"));
  process.channel.unref();
}
delete process.env.TROUPE_LAUNCHER_PID;
