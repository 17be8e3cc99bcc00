# The image: Python and its libraries out of Debian's packages, pgvigil and what it needs, and nothing else.
# There is no shell in it and no package manager, and it writes nothing.

# Any Debian 13, also one of a mirror or of your own; it is left behind.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS packages
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates python3-pip >/dev/null
# What an interpreter without a terminal needs. What dpkg would write is kept for those who look for known holes.
RUN mkdir -p /root/debs /image/var/lib/dpkg/status.d && cd /root/debs \
 && apt-get download -qq base-files libbz2-1.0 libc6 libexpat1 libffi8 libgcc-s1 liblzma5 libpython3.13-minimal \
      libpython3.13-stdlib libssl3t64 libuuid1 libzstd1 python3.13-minimal zlib1g \
 && for deb in *.deb; do dpkg-deb -x "$deb" /image \
      && dpkg-deb -f "$deb" > "/image/var/lib/dpkg/status.d/$(dpkg-deb -f "$deb" Package)" || exit 1; done \
 && cd /image \
 && ln -s python3.13 usr/bin/python3 \
 && find usr/share -mindepth 1 -maxdepth 1 ! -name doc -exec rm -r {} + \
 && find usr/share/doc -type f ! -name copyright -delete \
 && rm -r root usr/lib/python3.13/pydoc_data usr/lib/python3.13/test usr/lib/*-linux-gnu/gconv \
 && find usr/bin usr/sbin -mindepth 1 ! -name 'python3*' -delete \
 && mkdir -p etc/ssl/certs etc/pgvigil \
 && cp /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/ \
 && printf 'root:x:0:0::/:/nonexistent\npgvigil:x:65532:65532::/:/nonexistent\nnobody:x:65534:65534::/:/nonexistent\n' > etc/passwd \
 && printf 'root:x:0:\npgvigil:x:65532:\nnogroup:x:65534:\n' > etc/group

# Dependencies change less often than we do.
COPY requirements/run.txt /source/requirements/run.txt
RUN pip install --quiet --no-compile --only-binary :all: --require-hashes --target /image/usr/lib/python3/dist-packages \
      -r /source/requirements/run.txt
COPY . /source
RUN pip install --quiet --no-compile --no-deps --target /image/usr/lib/python3/dist-packages /source \
 && cd /image/usr/lib/python3/dist-packages && rm -r bin && find . -name tests -type d -prune -exec rm -r {} + \
 && mkdir -p /image/usr/local/bin \
 && printf '#!/usr/bin/python3 -I\nimport sys\n\nfrom pgvigil.cli import main\n\nsys.exit(main())\n' > /image/usr/local/bin/pgvigil \
 && chmod 755 /image/usr/local/bin/pgvigil \
 # Nobody will be able to write what Python compiles, so it is there, and is believed without a look at the source.
 && python3 -m compileall -q --invalidation-mode unchecked-hash -s /image -p / /image/usr/lib

FROM scratch
COPY --from=packages /image /
LABEL org.opencontainers.image.title="pgvigil" \
      org.opencontainers.image.description="PostgreSQL exporter for Prometheus" \
      org.opencontainers.image.source="https://github.com/pgvigil/pgvigil" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/usr/local/bin:/usr/bin PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 9187
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["pgvigil", "alive"]
ENTRYPOINT ["pgvigil"]
CMD ["serve"]
