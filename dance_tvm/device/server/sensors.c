/* What this device is, and how it is: what Linux says of clocks, heat and power. What cannot be read is left out. */
#include "server.h"

#include <fcntl.h>
#include <sys/utsname.h>
#include <unistd.h>

#define MOST_CPUS 1024
#define MOST_ZONES 256
#define CPUS "/sys/devices/system/cpu/cpu"

static int reads(char *to, size_t room, const char *format, int number, const char *file) {
  char path[PATH_BYTES];
  snprintf(path, sizeof path, format, number, file);
  return read_text(path, to, room) != 0;
}

static int is_number(const char *word) {
  if (*word == '-') word++;
  return *word && strspn(word, "0123456789") == strlen(word);
}

/* Each word of the first line that begins with `name`, as a list. */
static void add_words(text *to, const char *name, char *file) {
  char *line = strstr(file, name), *rest = NULL;
  line = line ? strchr(line, ':') : NULL;
  char *end = line ? strchr(line, '\n') : NULL;
  if (end) *end = 0;
  const char *comma = "";
  for (char *word = line ? strtok_r(line + 1, " \t", &rest) : NULL; word; word = strtok_r(NULL, " \t", &rest)) {
    add(to, "%s", comma);
    add_quoted(to, word);
    comma = ", ";
  }
}

void tell_facts(const store *files, text *to) {
  static char processors[1 << 16];
  struct utsname system = {0};
  char path[PATH_BYTES];
  int cpus = 0;
  uname(&system);
  for (int cpu = 0; cpu < MOST_CPUS; cpu++) {
    snprintf(path, sizeof path, CPUS "%d", cpu);
    cpus += !access(path, F_OK);
  }
  add(to, "{\"machine\": ");
  add_quoted(to, system.machine);
  add(to, ", \"system\": \"%s-", system.sysname);
  add(to, "%s\", \"cpus\": %d, \"cpu_features\": [", system.release, cpus);
  read_text("/proc/cpuinfo", processors, sizeof processors);
  add_words(to, strcmp(system.machine, "aarch64") ? "\nflags" : "\nFeatures", processors);
  add(to, "], \"tvm\": \"\", \"server\": \"dance_server\", \"protocol\": %u, \"free_bytes\": %llu}", PROTOCOL,
      (unsigned long long)store_free(files));
}

static void tell_clocks(text *to, const char *name, const char *file, int quoted) {
  char value[64];
  const char *comma = "";
  add(to, "\"%s\": {", name);
  for (int cpu = 0; cpu < MOST_CPUS; cpu++) {
    if (!reads(value, sizeof value, CPUS "%d/cpufreq/%s", cpu, file) || (!quoted && !is_number(value))) continue;
    add(to, "%s\"cpu%d\": ", comma, cpu);
    if (quoted) add_quoted(to, value);
    else add(to, "%s", value);
    comma = ", ";
  }
  add(to, "}, ");
}

static void tell_heat(text *to) {
  char name[64], value[64];
  const char *comma = "";
  add(to, "\"millidegrees\": {");
  for (int zone = 0; zone < MOST_ZONES; zone++) {
    if (!reads(value, sizeof value, "/sys/class/thermal/thermal_zone%d/%s", zone, "temp") || !is_number(value)) continue;
    if (!reads(name, sizeof name, "/sys/class/thermal/thermal_zone%d/%s", zone, "type"))
      snprintf(name, sizeof name, "thermal_zone%d", zone);
    add(to, "%s", comma);
    add_quoted(to, name);
    add(to, ": %s", value);
    comma = ", ";
  }
  add(to, "}, ");
}

static const char *tell_rail(text *to, const char *comma, const char *name, const char *volts, const char *amperes, double unit) {
  double milliwatts = strtod(volts, NULL) * strtod(amperes, NULL) * unit;
  add(to, "%s", comma);
  add_quoted(to, name);
  add(to, ": %.3f", milliwatts < 0 ? -milliwatts : milliwatts);
  return ", ";
}

/* The INA3221 monitors that a Jetson has, in millivolt and milliampere; a phone's battery, in millionths. */
static void tell_power(text *to) {
  char volts[64], amperes[64], name[64], path[64];
  const char *comma = "";
  add(to, "\"milliwatts\": {");
  for (int monitor = 0; monitor < MOST_ZONES; monitor++) {
    if (!reads(name, sizeof name, "/sys/class/hwmon/hwmon%d/%s", monitor, "name") || strcmp(name, "ina3221")) continue;
    for (int rail = 1; rail <= 3; rail++) {
      snprintf(path, sizeof path, "in%d_input", rail);
      int known = reads(volts, sizeof volts, "/sys/class/hwmon/hwmon%d/%s", monitor, path);
      snprintf(path, sizeof path, "curr%d_input", rail);
      known = known && reads(amperes, sizeof amperes, "/sys/class/hwmon/hwmon%d/%s", monitor, path);
      snprintf(path, sizeof path, "in%d_label", rail);
      if (!reads(name, sizeof name, "/sys/class/hwmon/hwmon%d/%s", monitor, path)) snprintf(name, sizeof name, "rail %d", rail);
      if (known && is_number(volts) && is_number(amperes)) comma = tell_rail(to, comma, name, volts, amperes, 1e-3);
    }
  }
  if (read_text("/sys/class/power_supply/battery/current_now", amperes, sizeof amperes) && is_number(amperes) &&
      read_text("/sys/class/power_supply/battery/voltage_now", volts, sizeof volts) && is_number(volts))
    tell_rail(to, comma, "battery total", volts, amperes, 1e-9);
  add(to, "}");
}

void tell_sensors(text *to) {
  add(to, "{");
  tell_clocks(to, "khz", "scaling_cur_freq", 0);
  tell_clocks(to, "max_khz", "cpuinfo_max_freq", 0);
  tell_clocks(to, "governor", "scaling_governor", 1);
  tell_heat(to);
  tell_power(to);
  add(to, "}");
}

int reset_peak(void) {
  int file = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
  ssize_t written = file < 0 ? -1 : write(file, "5", 1);
  if (file >= 0) close(file);
  return written == 1;
}

int64_t peak_memory(void) {
  char status[8192];
  read_text("/proc/self/status", status, sizeof status);
  const char *line = strstr(status, "VmHWM:");
  return line ? 1024 * strtoll(line + 6, NULL, 10) : -1;
}
