# Jetson. BASE is NVIDIA's L4T image with TensorRT for the JetPack on the device (its catalogue lists them).
# docker build -f docker/jetpack.Dockerfile --build-arg BASE=… --build-arg CUDA=12 -t bar-edge-jetpack .
# docker run --runtime nvidia -v "$PWD:/data" bar-edge-jetpack compile /data/bar_b-int8 --target host -o /data/bar_b-orin
ARG BASE
FROM ${BASE}
ARG CUDA=12
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN docker/install-jetpack.sh /opt/bar-edge "$CUDA" && rm -rf /root/.cache
ENV PATH=/opt/bar-edge/bin:$PATH
WORKDIR /data
ENTRYPOINT ["bar-edge"]
