# x86-64 with an RTX card (SM 8.0, 8.6, 8.9, 12.0).
# docker build -f docker/rtx.Dockerfile -t bar-edge-rtx .
# docker run --gpus all -v "$PWD:/data" bar-edge-rtx generate /data/bar_b-rtx --class 207 -o /data/out
FROM python:3.12-slim
WORKDIR /src
COPY . .
RUN docker/install-rtx.sh /opt/bar-edge && rm -rf /root/.cache
ENV PATH=/opt/bar-edge/bin:$PATH
WORKDIR /data
ENTRYPOINT ["bar-edge"]
