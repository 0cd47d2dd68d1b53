# Builds and runs artifacts for this machine, phones and boards: docker build -t dance-tvm . &&
#   docker run --rm -v "$PWD:/data" dance-tvm build --model net.pt2 --target snapdragon
FROM python:3.12-slim-bookworm

# For the emulated device, on which code for Arm is checked: --build-arg EMULATOR=1 (it then runs with --privileged).
ARG EMULATOR=0
RUN if [ "$EMULATOR" = 1 ]; then apt-get update \
    && apt-get install -y --no-install-recommends qemu-user mmdebstrap debian-archive-keyring \
    && rm -rf /var/lib/apt/lists/*; fi

WORKDIR /opt/dance_tvm
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dance_tvm dance_tvm
COPY schedules schedules
COPY targets targets
COPY tuning_logs tuning_logs
RUN pip install --no-cache-dir -c constraints.txt '.[onnx,train,tune,report]'

WORKDIR /data
ENTRYPOINT ["dance-tvm"]
CMD ["--help"]
